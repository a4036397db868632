"""Running an evaluation: from its configuration to rows, and from rows to what is reported of them."""
