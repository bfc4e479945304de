"""ConvNeXt trainer: from a folder of photos to a trained, evaluated, exported model."""

__version__ = "0.1.0"
