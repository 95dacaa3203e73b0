// NVRTC's interface for tests of what is around it: for sm_80 and sm_90 a "cubin" that says what it was made from,
// after a line in the file FAKE_NVRTC_LOG. FAKE_NVRTC_FAILS in the environment makes it an error.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

struct Program {
  std::string source, cubin;
};
static const char kLog[] = "decode_mma.cu(1): error: made by the test";

extern "C" {

int nvrtcVersion(int* major, int* minor) {
  *major = 99;
  *minor = 1;
  return 0;
}
int nvrtcGetNumSupportedArchs(int* count) {
  *count = 2;
  return 0;
}
int nvrtcGetSupportedArchs(int* architectures) {
  architectures[0] = 80;
  architectures[1] = 90;
  return 0;
}
int nvrtcCreateProgram(Program** program, const char* source, const char*, int, const char* const*,
                       const char* const*) {
  *program = new Program{source, ""};
  return 0;
}
int nvrtcCompileProgram(Program* program, int, const char* const* options) {
  if (getenv("FAKE_NVRTC_FAILS")) return 6;
  if (FILE* log = fopen(getenv("FAKE_NVRTC_LOG"), "a")) {
    fprintf(log, "%s\n", options[0]);
    fclose(log);
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  program->cubin = options[0] + program->source;
  return 0;
}
int nvrtcDestroyProgram(Program** program) {
  delete *program;
  return 0;
}
int nvrtcGetProgramLogSize(Program*, size_t* size) {
  *size = sizeof kLog;
  return 0;
}
int nvrtcGetProgramLog(Program*, char* log) {
  memcpy(log, kLog, sizeof kLog);
  return 0;
}
int nvrtcGetCUBINSize(Program* program, size_t* size) {
  *size = program->cubin.size();
  return 0;
}
int nvrtcGetCUBIN(Program* program, char* cubin) {
  memcpy(cubin, program->cubin.data(), program->cubin.size());
  return 0;
}

}  // extern "C"
