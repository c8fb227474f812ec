// The instruction sets that the CPU kernels are compiled for, portable first and best last: the one
// list of them. A set is a block here and, for its compiler flags, one df_kernels line in
// CMakeLists.txt, which defines DF_HAS_<SET> where the compiler can make it.
#pragma once

// DF_ISAS(X, ...) is X(set, ...) for every set, whose kernels are in namespace df::set.
#define DF_ISAS(X, ...) X(base, __VA_ARGS__) DF_ISAS_V3(X, __VA_ARGS__) DF_ISAS_V4(X, __VA_ARGS__)

namespace df {

struct InstructionSet {
  const char* name;
  bool (*runs)();  // whether this machine has it
};

namespace base {
constexpr InstructionSet SET = {"portable", [] { return true; }};
}

#ifdef DF_HAS_V3
#define DF_ISAS_V3(X, ...) X(v3, __VA_ARGS__)
namespace v3 {
constexpr InstructionSet SET = {"x86-64-v3", [] {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
}};
}
#else
#define DF_ISAS_V3(X, ...)
#endif

#ifdef DF_HAS_V4
#define DF_ISAS_V4(X, ...) X(v4, __VA_ARGS__)
namespace v4 {
constexpr InstructionSet SET = {"x86-64-v4", [] {
  return v3::SET.runs() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}};
}
#else
#define DF_ISAS_V4(X, ...)
#endif

}  // namespace df
