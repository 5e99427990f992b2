"""What any room may use: files that appear whole, progress bars, tables."""
