"""Files: paths, locks, whole writes, contents."""
