"""TVM as a kernel engine that we drive."""
