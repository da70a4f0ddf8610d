"""One definition of features: offline on Delta Lake, online on Redis, joined as of any time."""
