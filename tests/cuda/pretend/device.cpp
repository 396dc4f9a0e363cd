// A pretend GPU: PyTorch's device PrivateUse1, whose memory is the host's and whose kernels are the CPU's.
//
// What is kept of a GPU is what goes wrong on one:
//   - tensors of two devices do not go together;
//   - work is in order within a stream only: what touches memory that another stream still works on, with no event waited
//     for in between, raises (a vector clock for each stream, and the last accesses of each range of memory);
//   - a copy to pinned memory that does not block arrives when the host has waited for it: until then there are NaNs;
//   - memory has a limit, of the device and of pinned memory, beyond which torch's own errors are raised;
//   - whatever makes the host wait is counted.
#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/TensorUtils.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <set>

namespace {
using namespace at;

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr int kStreams = 512;

// ---------------------------------------------------------------------------------------------------------------- time
using Clock = std::array<uint32_t, kStreams>;

struct Access {
  const char *begin, *end;
  int stream;
  uint32_t when;
  bool writes;
  std::string op;
};

struct Block {
  size_t size;
  int device;
  std::vector<Access> accesses;
};

struct Event {
  Clock clock{};
};

struct Pending {
  int stream;
  uint32_t when;
  Tensor target, values;
};

std::recursive_mutex lock;
std::vector<Clock> clocks(kStreams);
Clock host{};
int next_stream = 64;  // below are the devices' default streams
std::map<const char*, Block> blocks;
std::vector<Pending> pending;
std::map<std::string, int64_t> counts;
bool checks_races = true;
thread_local bool is_quiet = false;  // copies of the fallback itself
py::object* on_wait = nullptr;  // called with the kind of each wait
std::map<int, Clock> tickets;
int next_ticket = 0;

int device_count() {
  static const int count = std::getenv("PRETEND_DEVICES") ? std::atoi(std::getenv("PRETEND_DEVICES")) : 2;
  return count;
}
thread_local int current_device = 0;
thread_local std::map<int, int64_t> current_streams;

// The default stream of device d is d; a communicator's is 32 + d.
int index_of(const c10::Stream& stream) { return stream.id() ? int(stream.id()) : int(stream.device_index()); }
int stream_of(int device) {
  auto found = current_streams.find(device);
  return found == current_streams.end() || found->second == 0 ? device : int(found->second);
}
void join(Clock& a, const Clock& b) {
  for (int i = 0; i < kStreams; i++) a[i] = std::max(a[i], b[i]);
}
void deliver(const Clock& seen) {
  std::vector<Pending> rest;
  for (auto& copy : pending) {
    if (seen[copy.stream] >= copy.when)
      copy.target.copy_(copy.values);
    else
      rest.push_back(copy);
  }
  pending.swap(rest);
}
void host_waits(const Clock& until, const char* why) {
  std::lock_guard<std::recursive_mutex> held(lock);
  if (is_quiet) return;
  if (on_wait) {
    py::gil_scoped_acquire gil;
    (*on_wait)(why);
  }
  counts[why]++;
  join(host, until);
  deliver(host);
}
void host_waits_for(int stream, const char* why) {
  std::lock_guard<std::recursive_mutex> held(lock);
  host_waits(clocks[stream], why);
}
uint32_t begin_work(int stream) {
  join(clocks[stream], host);
  return ++clocks[stream][stream];
}
std::pair<const char*, const char*> range_of(const Tensor& t) {
  int64_t extent = 1;
  for (int64_t i = 0; i < t.dim(); i++) extent += (t.size(i) - 1) * t.stride(i);
  auto begin = static_cast<const char*>(t.unsafeGetTensorImpl()->data());
  return {begin, begin + extent * t.element_size()};
}
void touch(const Tensor& t, int stream, uint32_t when, bool writes, const std::string& op) {
  if (!checks_races || !t.defined() || t.numel() == 0 || t.device().type() != kDevice) return;
  auto [begin, end] = range_of(t);
  auto found = blocks.upper_bound(begin);
  if (found == blocks.begin()) return;
  Block& block = std::prev(found)->second;
  std::vector<Access> rest;
  for (auto& old : block.accesses) {
    bool apart = old.end <= begin || end <= old.begin;
    TORCH_CHECK(apart || !(writes || old.writes) || clocks[stream][old.stream] >= old.when, "pretend: ", op, " on stream ",
                stream, writes ? " writes" : " reads", " what ", old.op, " on stream ", old.stream,
                old.writes ? " wrote" : " reads", ", and nothing has waited for it");
    bool covered = begin <= old.begin && old.end <= end && (writes || (!old.writes && old.stream == stream));
    bool over = block.accesses.size() > 64 && host[old.stream] >= old.when;
    if (!covered && !over) rest.push_back(old);
  }
  rest.push_back({begin, end, stream, when, writes, op});
  block.accesses.swap(rest);
}

// -------------------------------------------------------------------------------------------------------------- memory
struct Usage {
  int64_t now = 0, peak = 0, limit = std::numeric_limits<int64_t>::max();
};
std::map<int, Usage> usage;  // by device; -1 is pinned memory of the host
std::map<const char*, size_t> pinned;

void* take(Usage& use, size_t n) {
  use.now += int64_t(n);
  use.peak = std::max(use.peak, use.now);
  return std::aligned_alloc(64, (n + 63) / 64 * 64);
}
void give_back(void* p) {
  std::lock_guard<std::recursive_mutex> held(lock);
  auto found = blocks.find(static_cast<char*>(p));
  if (found != blocks.end()) {
    usage[found->second.device].now -= int64_t(found->second.size);
    blocks.erase(found);
  }
  std::free(p);
}
void unpin(void* p) {
  std::lock_guard<std::recursive_mutex> held(lock);
  auto found = pinned.find(static_cast<char*>(p));
  if (found != pinned.end()) {
    usage[-1].now -= int64_t(found->second);
    pinned.erase(found);
  }
  std::free(p);
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    std::lock_guard<std::recursive_mutex> held(lock);
    c10::Device device(kDevice, c10::DeviceIndex(current_device));
    if (n == 0) return {nullptr, nullptr, &give_back, device};
    Usage& use = usage[current_device];
    TORCH_CHECK_WITH(OutOfMemoryError, use.now + int64_t(n) <= use.limit, "CUDA out of memory. Tried to allocate ", n,
                     " bytes. GPU ", current_device, " has a total capacity of ", use.limit, " bytes of which ",
                     use.limit - use.now, " bytes is free.");
    auto p = static_cast<char*>(take(use, n));
    blocks[p] = {n, current_device, {}};
    return {p, p, &give_back, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* d, const void* s, std::size_t n) const override { std::memcpy(d, s, n); }
};
struct Pinned final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    std::lock_guard<std::recursive_mutex> held(lock);
    if (n == 0) return {nullptr, nullptr, &unpin, c10::Device(kCPU)};
    Usage& use = usage[-1];
    TORCH_CHECK(use.now + int64_t(n) <= use.limit, "CUDA error: out of memory\nCUDA kernel errors might be asynchronously "
                "reported at some other API call");
    auto p = static_cast<char*>(take(use, n));
    pinned[p] = n;
    return {p, p, &unpin, c10::Device(kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* d, const void* s, std::size_t n) const override { std::memcpy(d, s, n); }
};
Memory memory;
Pinned pinned_memory;
REGISTER_ALLOCATOR(kDevice, &memory);

bool is_pinned_pointer(const void* data) {
  std::lock_guard<std::recursive_mutex> held(lock);
  auto p = static_cast<const char*>(data);
  auto found = pinned.upper_bound(p);
  return found != pinned.begin() && p < std::prev(found)->first + std::prev(found)->second;
}

// ------------------------------------------------------------------------------------------------ devices and streams
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device d) const override {
    auto old = getDevice();
    setDevice(d);
    return old;
  }
  c10::Device getDevice() const override { return c10::Device(kDevice, c10::DeviceIndex(current_device)); }
  void setDevice(c10::Device d) const override {
    if (d.index() < 0) return;
    TORCH_CHECK(d.index() < device_count(), "CUDA error: invalid device ordinal");
    current_device = d.index();
  }
  void uncheckedSetDevice(c10::Device d) const noexcept override {
    if (d.index() >= 0) current_device = d.index();
  }
  c10::Stream getStream(c10::Device d) const override {
    int device = d.index() < 0 ? current_device : d.index();
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(kDevice, c10::DeviceIndex(device)), current_streams[device]);
  }
  c10::Stream getDefaultStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream getNewStream(c10::Device d, int) const override {
    std::lock_guard<std::recursive_mutex> held(lock);
    TORCH_CHECK(next_stream < kStreams, "pretend: too many streams");
    int device = d.index() < 0 ? current_device : d.index();
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(kDevice, c10::DeviceIndex(device)), next_stream++);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override { return getNewStream(d, 0); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    auto old = getStream(s.device());
    current_streams[s.device_index()] = s.id();
    return old;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return c10::DeviceIndex(device_count()); }
  void record(void** event, const c10::Stream& s, const c10::DeviceIndex, const c10::EventFlag) const override {
    std::lock_guard<std::recursive_mutex> held(lock);
    if (*event == nullptr) *event = new Event();
    auto& clock = clocks[index_of(s)];
    join(clock, host);
    static_cast<Event*>(*event)->clock = clock;
  }
  void block(void* event, const c10::Stream& s) const override {
    std::lock_guard<std::recursive_mutex> held(lock);
    if (event) join(clocks[index_of(s)], static_cast<Event*>(event)->clock);
  }
  bool queryEvent(void* event) const override {
    if (event) {
      std::lock_guard<std::recursive_mutex> held(lock);
      join(host, static_cast<Event*>(event)->clock);
      deliver(host);
    }
    return true;
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void synchronizeEvent(void* event) const override {
    if (event) host_waits(static_cast<Event*>(event)->clock, "event");
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream& s) const override { host_waits_for(index_of(s), "stream"); }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    std::lock_guard<std::recursive_mutex> held(lock);
    Clock all = host;
    for (auto& clock : clocks) join(all, clock);
    host_waits(all, "device");
  }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 1.0; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);
const Guard guard;

struct Hooks final : PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return c10::DeviceIndex(device_count()); }
  void setCurrentDevice(c10::DeviceIndex d) const override { guard.setDevice(c10::Device(kDevice, d)); }
  c10::DeviceIndex getCurrentDevice() const override { return c10::DeviceIndex(current_device); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex d) const override {
    return guard.exchangeDevice(c10::Device(kDevice, d)).index();
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex d) const override { return exchangeDevice(d); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* data) const override { return is_pinned_pointer(data); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    // As CUDA's: a new block, what fits of the old bytes, the old block freed.
    auto* impl = storage.unsafeGetStorageImpl();
    c10::DataPtr next = memory.allocate(size);
    if (size && storage.nbytes()) std::memcpy(next.get(), storage.data(), std::min(size, storage.nbytes()));
    impl->set_data_ptr_noswap(std::move(next));
    impl->set_nbytes(size);
  }
};
const bool registered = [] {
  RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

// ------------------------------------------------------------------------------------------------------------ operators
bool is_ours(const Tensor& t) { return t.defined() && t.device().type() == kDevice; }

// The same bytes as a CPU tensor.
Tensor as_cpu(const Tensor& t) {
  auto options = t.options().device(kCPU).requires_grad(false);
  if (t.numel() == 0) return at::empty_strided(t.sizes(), t.strides(), options);
  return at::from_blob(t.unsafeGetTensorImpl()->mutable_data(), t.sizes(), t.strides(), [](void*) {}, options, c10::Device(kCPU));
}

Tensor pretend_empty(c10::SymIntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>,
                     std::optional<Device> device, std::optional<bool>, std::optional<MemoryFormat> format) {
  c10::OptionalDeviceGuard on(device);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   dtype.value_or(typeMetaToScalarType(get_default_dtype())), format);
}
Tensor pretend_empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<ScalarType> dtype,
                             std::optional<Layout>, std::optional<Device> device, std::optional<bool>) {
  c10::OptionalDeviceGuard on(device);
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           dtype.value_or(typeMetaToScalarType(get_default_dtype())));
}
Tensor from_cpu(const Tensor& t) {
  auto result = pretend_empty_strided(t.sizes(), t.strides(), t.scalar_type(), {}, {}, {});
  if (t.numel()) as_cpu(result).copy_(t);
  return result;
}

Tensor pretend_copy_from(const Tensor& self, const Tensor& target, bool non_blocking) {
  std::lock_guard<std::recursive_mutex> held(lock);
  int device = is_ours(target) ? target.device().index() : self.device().index();
  int stream = stream_of(device);
  auto when = begin_work(stream);
  touch(self, stream, when, false, "copy");
  touch(target, stream, when, true, "copy");
  if (is_ours(self) && is_ours(target)) {
    as_cpu(target).copy_(as_cpu(self));
  } else if (is_ours(target)) {
    deliver(clocks[stream]);
    as_cpu(target).copy_(self);
    if (!non_blocking) host_waits_for(stream, "copy to device");
  } else if (non_blocking && is_pinned_pointer(target.unsafeGetTensorImpl()->data())) {
    auto values = as_cpu(self).clone();
    target.is_floating_point() ? target.fill_(NAN) : target.fill_(-1);
    pending.push_back({stream, when, target.detach(), values});
  } else {
    target.copy_(as_cpu(self));
    host_waits_for(stream, "copy to host");
  }
  return target;
}
Tensor copy_and_resize(const Tensor& self, const Tensor& target) {
  const_cast<Tensor&>(target).resize_(self.sizes());
  return pretend_copy_from(self, target, true);
}
Tensor pretend_as_strided(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                          std::optional<c10::SymInt> offset) {
  auto result = at::detail::make_tensor<TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(self.storage()), self.key_set(), self.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset ? std::optional<int64_t>(offset->expect_int()) : std::optional<int64_t>(self.storage_offset()));
  return result;
}
Tensor pretend_view(const Tensor& self, c10::SymIntArrayRef size) {
  auto shape = at::infer_size_dv(C10_AS_INTARRAYREF_SLOW(size), self.numel());
  auto stride = at::detail::computeStride(self.sizes(), self.strides(), shape);
  TORCH_CHECK(stride.has_value(), "view size is not compatible with input tensor's size and stride");
  std::vector<c10::SymInt> a(shape.begin(), shape.end()), b(stride->begin(), stride->end());
  return pretend_as_strided(self, a, b, self.storage_offset());
}
Tensor pretend_alias(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return pretend_as_strided(self, size, stride, self.storage_offset());
}
Tensor view_dtype(const Tensor& self, ScalarType dtype) {
  auto cpu = as_cpu(self).view(dtype);
  auto result = at::detail::make_tensor<TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(self.storage()), self.key_set(), c10::scalarTypeToTypeMeta(dtype));
  auto offset = self.storage_offset() * int64_t(self.element_size()) / int64_t(cpu.element_size());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), std::optional<int64_t>(offset));
  return result;
}
Scalar pretend_scalar(const Tensor& self) {
  std::lock_guard<std::recursive_mutex> held(lock);
  int stream = stream_of(self.device().index());
  touch(self, stream, begin_work(stream), false, "item");
  host_waits_for(stream, "item");
  return as_cpu(self).item();
}
const Tensor& pretend_resize(const Tensor& self, c10::SymIntArrayRef size, std::optional<MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  size_t need = (self.numel() + self.storage_offset()) * self.element_size();
  if (need > self.storage().nbytes()) at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(self.storage(), need);
  return self;
}
Tensor& pretend_set(Tensor& self, Storage s, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(s));
  auto z = C10_AS_INTARRAYREF_SLOW(size);
  auto t = C10_AS_INTARRAYREF_SLOW(stride);
  if (t.empty() && !z.empty()) {
    self.unsafeGetTensorImpl()->set_storage_offset(offset.expect_int());
    self.unsafeGetTensorImpl()->set_sizes_contiguous(z);
  } else {
    self.unsafeGetTensorImpl()->set_sizes_and_strides(z, t, offset.expect_int());
  }
  return self;
}
void pretend_record_stream(Tensor&, Stream) {}

bool host_must_wait(const std::string& name, const torch::jit::Stack& stack) {
  static const std::set<std::string> waits{"aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2",
                                           "aten::unique_dim", "aten::unique_consecutive", "aten::bincount"};
  if (waits.count(name)) return true;
  if (name != "aten::index" && name != "aten::index_put_" && name != "aten::_index_put_impl_") return false;
  for (const IValue& v : stack)
    if (v.isOptionalTensorList())
      for (const std::optional<Tensor>& t : v.toOptionalTensorVector())
        if (t && t->defined() && (t->scalar_type() == kBool || t->scalar_type() == kByte)) return true;
  return false;
}

// Every operator that is not above: the CPU's kernel on the same bytes.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  const size_t count = schema.arguments().size(), first = stack->size() - count;
  const bool is_index = name.rfind("aten::index", 0) == 0 || name.rfind("aten::_index", 0) == 0;

  // Of which devices are the tensors?
  std::vector<std::pair<Tensor, bool>> tensors;  // and whether it is written
  bool has_out = false;
  for (size_t i = 0; i < count; i++) {
    const auto& argument = schema.arguments()[i];
    bool writes = argument.alias_info() && argument.alias_info()->isWrite();
    has_out |= writes && argument.kwarg_only();
    const IValue& v = (*stack)[first + i];
    if (v.isTensor()) tensors.emplace_back(v.toTensor(), writes);
    else if (v.isTensorList()) for (const Tensor& t : v.toTensorVector()) tensors.emplace_back(t, writes);
    else if (v.isOptionalTensorList()) for (const auto& t : v.toOptionalTensorVector()) if (t) tensors.emplace_back(*t, writes);
  }
  int device = -1;
  for (auto& [t, writes] : tensors)
    if (is_ours(t)) {
      TORCH_CHECK(device < 0 || device == t.device().index(), "Expected all tensors to be on the same device, but found pretend:",
                  device, " and pretend:", t.device().index(), " in ", name);
      device = t.device().index();
    }
  for (auto& [t, writes] : tensors)
    TORCH_CHECK(device < 0 || !t.defined() || is_ours(t) || (t.dim() == 0 && !writes) || (is_index && t.scalar_type() == kLong && !writes),
                "Expected all tensors to be on the same device, but found pretend:", device, " and ", t.device(), " in ", name);
  if (device < 0) device = current_device;
  c10::OptionalDeviceGuard on(c10::Device(kDevice, c10::DeviceIndex(device)));

  // When does it run?
  int stream = stream_of(device);
  uint32_t when;
  {
    std::lock_guard<std::recursive_mutex> held(lock);
    counts["kernels"]++;
    when = begin_work(stream);
    for (auto& [t, writes] : tensors) touch(t, stream, when, writes, name);
    if (host_must_wait(name, torch::jit::last(*stack, count).vec())) host_waits_for(stream, "nonzero");
  }
  if (has_out) {  // which may be resized
    is_quiet = true;
    try {
      at::native::cpu_fallback(op, stack);
    } catch (...) {
      is_quiet = false;
      throw;
    }
    is_quiet = false;
    return;
  }
  torch::jit::Stack given(stack->begin() + first, stack->end());
  auto seen = [](const Tensor& t) { return is_ours(t) ? as_cpu(t) : t; };
  for (size_t i = 0; i < count; i++) {
    IValue& v = (*stack)[first + i];
    if (v.isTensor()) {
      v = seen(v.toTensor());
    } else if (v.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : v.toTensorVector()) list.push_back(seen(t));
      v = list;
    } else if (v.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& t : v.toOptionalTensorVector()) list.push_back(t ? std::optional<Tensor>(seen(*t)) : t);
      v = list;
    } else if (v.isDevice()) {
      v = c10::Device(kCPU);
    }
  }
  try {
    op.callBoxed(stack);
  } catch (const c10::IndexError&) {
    TORCH_CHECK(false, "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported at some other API call");
  }
  const size_t results = schema.returns().size();
  auto back = [&](const Tensor& t) -> Tensor {
    if (!t.defined()) return t;
    for (const IValue& v : given)  // a view
      if (v.isTensor() && is_ours(v.toTensor()) && t.numel() && t.storage().data() >= v.toTensor().storage().data() &&
          static_cast<const char*>(t.storage().data()) < static_cast<const char*>(v.toTensor().storage().data()) + v.toTensor().storage().nbytes()) {
        const Tensor& base = v.toTensor();
        auto offset = (static_cast<const char*>(t.unsafeGetTensorImpl()->data()) - static_cast<const char*>(base.storage().data())) / int64_t(t.element_size());
        auto view = at::detail::make_tensor<TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), t.dtype());
        view.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), std::optional<int64_t>(offset));
        return view;
      }
    Tensor result = from_cpu(t);
    std::lock_guard<std::recursive_mutex> held(lock);
    touch(result, stream, when, true, name);
    return result;
  };
  for (size_t i = 0; i < results; i++) {
    IValue& v = (*stack)[stack->size() - results + i];
    const auto* alias = schema.returns()[i].alias_info();
    if (alias && alias->isWrite()) {
      for (size_t a = 0; a < count; a++) {
        const auto* other = schema.arguments()[a].alias_info();
        if (other && *other == *alias) v = given[a];
      }
    } else if (v.isTensor()) {
      v = back(v.toTensor());
    } else if (v.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : v.toTensorVector()) list.push_back(back(t));
      v = list;
    }
  }
}

// ----------------------------------------------------------------------------------------------------- communicators
// Collectives run on a stream of their own, which first waits for the current one; the caller waits with the ticket.
int begin_collective(const std::vector<Tensor>& reads, const std::vector<Tensor>& writes, const std::string& name) {
  std::lock_guard<std::recursive_mutex> held(lock);
  int device = (reads.empty() ? writes : reads).at(0).device().index();
  int stream = 32 + device;
  join(clocks[stream], clocks[stream_of(device)]);
  auto when = begin_work(stream);
  for (auto& t : reads) touch(t, stream, when, false, name);
  for (auto& t : writes) touch(t, stream, when, true, name);
  tickets[next_ticket] = clocks[stream];
  return next_ticket++;
}
void wait_collective(int ticket) {
  std::lock_guard<std::recursive_mutex> held(lock);
  auto found = tickets.find(ticket);
  if (found != tickets.end()) join(clocks[stream_of(current_device)], found->second);
}
}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", pretend_empty);
  m.impl("empty_strided", pretend_empty_strided);
  m.impl("_copy_from", pretend_copy_from);
  m.impl("_copy_from_and_resize", copy_and_resize);
  m.impl("as_strided", pretend_as_strided);
  m.impl("view", pretend_view);
  m.impl("view.dtype", view_dtype);
  m.impl("_reshape_alias", pretend_alias);
  m.impl("_local_scalar_dense", pretend_scalar);
  m.impl("resize_", pretend_resize);
  m.impl("set_.source_Storage_storage_offset", pretend_set);
  m.impl("record_stream", pretend_record_stream);
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  // Whoever holds the lock may want the GIL.
  using Free = py::call_guard<py::gil_scoped_release>;
  using Held = std::lock_guard<std::recursive_mutex>;
  m.def("device_count", &device_count);
  m.def("current_device", [] { return current_device; });
  m.def("set_device", [](int d) { guard.setDevice(c10::Device(kDevice, c10::DeviceIndex(d))); });
  m.def("synchronize", [] { guard.synchronizeDevice(0); }, Free());
  m.def("counts", [] { Held held(lock); return counts; }, Free());
  m.def("reset_counts", [] { Held held(lock); counts.clear(); }, Free());
  m.def("on_wait", [](py::object call) { on_wait = call.is_none() ? nullptr : new py::object(call); });
  m.def("check_races", [](bool on) { std::swap(checks_races, on); return on; });
  m.def("memory", [](int d) { Held held(lock); return std::make_pair(usage[d].now, usage[d].peak); }, Free());
  m.def("reset_peak", [](int d) { Held held(lock); usage[d].peak = usage[d].now; }, Free());
  m.def("limit", [](int d, int64_t n) { Held held(lock); usage[d].limit = n; }, Free());
  m.def("host_view", &as_cpu);
  m.def("begin_collective", &begin_collective, Free());
  m.def("wait_collective", &wait_collective, Free());
}
