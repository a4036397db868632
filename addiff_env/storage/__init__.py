"""Files: locks, whole writes, contents."""
