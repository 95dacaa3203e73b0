// Cubins in runtime_shim.cc: a kernel of one is there if the cubin has it by that name, and runs as g++ has built it
// for the tests (compiled_kernels.cc provides those).
#pragma once
#include <elf.h>

#include <cstring>
#include <map>
#include <set>
#include <string>

namespace shim {

// Kernels that g++ has built, by their names.
inline std::map<std::string, const void*>& provided() {
  static auto* all = new std::map<std::string, const void*>;
  return *all;
}

struct CudaLibrary {
  std::set<std::string> symbols;
};

// Reads a cubin's symbols; null: it is none.
inline CudaLibrary* read_cubin(const void* code) {
  constexpr int kMachine = 190;  // EM_CUDA
  const auto* bytes = static_cast<const char*>(code);
  const auto* header = static_cast<const Elf64_Ehdr*>(code);
  if (memcmp(header->e_ident, ELFMAG, SELFMAG) != 0 || header->e_machine != kMachine) return nullptr;
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(bytes + header->e_shoff);
  auto* library = new CudaLibrary;
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const auto* symbols = reinterpret_cast<const Elf64_Sym*>(bytes + sections[i].sh_offset);
    const char* names = bytes + sections[sections[i].sh_link].sh_offset;
    for (size_t s = 0; s < sections[i].sh_size / sizeof *symbols; ++s) {
      if (ELF64_ST_TYPE(symbols[s].st_info) == STT_FUNC) library->symbols.insert(names + symbols[s].st_name);
    }
  }
  return library;
}

// Null: the library has no kernel of this name, or nothing was provided for it.
inline const void* kernel_of(const CudaLibrary& library, const char* name) {
  const auto found = provided().find(name);
  return library.symbols.count(name) && found != provided().end() ? found->second : nullptr;
}

}  // namespace shim

// For compiled_kernels.cc, which may be in another library.
extern "C" __attribute__((used)) inline void skv_shim_provide(const char* name, const void* kernel) {
  shim::provided()[name] = kernel;
}
