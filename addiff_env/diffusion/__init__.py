"""Models and solvers: what denoises; no policy."""
