"""The networks (nn.Module only), their published weight layouts, and safe checkpoint reading."""
