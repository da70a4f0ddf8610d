"""Function images, assembled layer by layer on this machine: no builder, no network, the same digest every time."""
