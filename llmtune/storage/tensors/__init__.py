"""Files of tensors: types, headers, writing, blocks of rows, and checks."""
