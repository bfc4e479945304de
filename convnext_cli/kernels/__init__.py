"""Fast operators of a ConvNeXt block, each with a plain PyTorch twin that defines it."""
