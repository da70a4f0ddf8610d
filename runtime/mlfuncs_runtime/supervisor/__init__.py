"""What keeps the registry's desired state: judgement as pure functions, and the hands that carry it out."""
