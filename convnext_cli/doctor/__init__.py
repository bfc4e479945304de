"""What `convnext doctor` looks at; it changes nothing."""
