"""What each operation sends, one module per subject. Pure: operations yield effects, the transport executes them."""
