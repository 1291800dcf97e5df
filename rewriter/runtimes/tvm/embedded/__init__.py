"""A compiled model as a static library with a C header: no Python, no TVM, no operating system calls but malloc."""
