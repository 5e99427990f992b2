"""What every part of the package may use: files, progress bars, tables, figures."""
