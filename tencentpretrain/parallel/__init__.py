"""Models cut over processes: by columns and rows of their matrices, and by layers."""
