"""The native attention kernel: C++ with a plain C interface, built per instruction set when the package is installed, called by address."""
