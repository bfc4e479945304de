"""What will run: every derived number, resolved once from a recipe and a cluster."""
