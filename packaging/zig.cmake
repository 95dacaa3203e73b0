# A toolchain: zig's C++ compiler, which compiles for every platform from any, with a C++ library of its own inside.
#   pip install ziglang
#   cmake -S . -B build/win -G Ninja -DCMAKE_TOOLCHAIN_FILE=packaging/zig.cmake -DSKV_ZIG_TARGET=x86_64-windows-gnu
# Targets that are built and tested: x86_64-linux-gnu.2.28, aarch64-linux-gnu.2.28, aarch64-macos.11.0, x86_64-windows-gnu.
set(SKV_ZIG_TARGET "x86_64-linux-gnu.2.28" CACHE STRING "What zig compiles for")
set(SKV_ZIG python3 -m ziglang CACHE STRING "The command that runs zig")
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES SKV_ZIG_TARGET SKV_ZIG)

string(REGEX MATCH "^([^-]+)-([a-z]+)" matched "${SKV_ZIG_TARGET}")
set(CMAKE_SYSTEM_PROCESSOR ${CMAKE_MATCH_1})
set(systems linux Linux macos Darwin windows Windows)
list(FIND systems "${CMAKE_MATCH_2}" place)
if(place EQUAL -1)
  message(FATAL_ERROR "SKV_ZIG_TARGET: got ${SKV_ZIG_TARGET}; expected a target for linux, macos or windows")
endif()
math(EXPR place "${place} + 1")
list(GET systems ${place} CMAKE_SYSTEM_NAME)

# zig compiles for the processor that it runs on unless it is told a plain one; faster code is chosen when it is loaded.
set(CMAKE_C_COMPILER ${SKV_ZIG} cc -target ${SKV_ZIG_TARGET} -mcpu=baseline)
set(CMAKE_CXX_COMPILER ${SKV_ZIG} c++ -target ${SKV_ZIG_TARGET} -mcpu=baseline)
set(SKV_NEON_FLAGS -mcpu=generic+v8_2a+dotprod CACHE STRING "zig has no -march")
