"""Looking at what a teacher thinks: figures, comparisons and pictures."""
