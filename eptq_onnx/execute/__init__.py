"""Running networks whole, block by block or layer by layer, and comparing what they give."""
