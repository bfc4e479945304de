"""Bytes in shards become batches on a device."""
