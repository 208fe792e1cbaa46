// Symbols that the headers of a newer compiler expect in its runtime libraries. With its own
// copies, libmaefast.so also loads beside glibc 2.28 and the libstdc++ of GCC 8 (manylinux_2_28).
#include <sstream>

#ifdef __GLIBCXX__
template std::basic_ostringstream<char>::basic_ostringstream();  // GCC 9
template std::basic_stringstream<char>::basic_stringstream();
template std::string std::basic_stringbuf<char>::str() const&;  // GCC 11
template std::string std::basic_stringbuf<char>::str() &&;

// glibc 2.32; std::shared_ptr counts without atomics where it is not zero.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif
