// The files themselves, put into the library by the assembler. SKV_CUDA_SOURCES is this folder.
#include "kernel_sources.h"

#define SKV_TEXT(symbol, file)                                                  \
  extern "C" const char symbol[];                                               \
  asm(".pushsection .rodata\n.globl " #symbol "\n.hidden " #symbol "\n" #symbol \
      ":\n"                                                                     \
      ".incbin \"" SKV_CUDA_SOURCES "/" file "\"\n.byte 0\n.popsection\n");

SKV_TEXT(skv_text_attention, "attention.cuh")
SKV_TEXT(skv_text_channels, "channels.cuh")
SKV_TEXT(skv_text_codes, "codes.cuh")
SKV_TEXT(skv_text_decode_mma, "decode_mma.cuh")
SKV_TEXT(skv_text_device, "device.cuh")
SKV_TEXT(skv_text_kv_layout, "../kv_layout.h")
SKV_TEXT(skv_text_mma_form, "mma_form.h")
SKV_TEXT(skv_text_mma_shape, "mma_shape.cuh")
SKV_TEXT(skv_text_mma_warp, "mma_warp.cuh")
SKV_TEXT(skv_text_nvrtc_language, "nvrtc_language.h")
SKV_TEXT(skv_text_portable, "portable.cuh")

namespace skv::cuda {

const SourceText kKernelSources[] = {
    {"attention.cuh", skv_text_attention},
    {"channels.cuh", skv_text_channels},
    {"codes.cuh", skv_text_codes},
    {"decode_mma.cuh", skv_text_decode_mma},
    {"device.cuh", skv_text_device},
    {"../kv_layout.h", skv_text_kv_layout},
    {"mma_form.h", skv_text_mma_form},
    {"mma_shape.cuh", skv_text_mma_shape},
    {"mma_warp.cuh", skv_text_mma_warp},
    {"nvrtc_language.h", skv_text_nvrtc_language},
    {"portable.cuh", skv_text_portable},
    // What nvrtc_language.h stands for.
    {"cstdint", ""},
    {"cstring", ""},
    {"cuda_fp16.h", ""},
    {"cuda_runtime.h", ""},
    {"stdint.h", ""},
};
const size_t kKernelSourceCount = sizeof kKernelSources / sizeof *kKernelSources;

}  // namespace skv::cuda
