"""How images are drawn: what people write down of it, and the choice among candidates."""
