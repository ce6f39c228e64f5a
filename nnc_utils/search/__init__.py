"""Architecture search: a space of Specs, what they cost, shared weights, and ways to choose among them."""
