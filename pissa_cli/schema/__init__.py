"""What a recipe may say, and from which files and flags it comes."""
