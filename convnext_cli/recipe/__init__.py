"""What is asked: the recipe's schema and its files."""
