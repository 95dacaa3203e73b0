"""The native library: C++ and CUDA sources, and the library as Python loads it."""
