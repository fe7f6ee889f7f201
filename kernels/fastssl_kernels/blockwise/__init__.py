"""The losses streamed over blocks of the bank in plain torch: any device, any dtype, no N x K tensor."""
