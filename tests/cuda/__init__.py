"""What CUDA does otherwise than a CPU, tried without a GPU: on a pretend one, and with what drivers
say mocked.
"""
