// The launchers as callers see them: df::X(args) is X of the instruction set in use.
#include <iterator>
#include <stdexcept>

#include "common.h"
#include "isa.h"

// Every DF_DECLARE of the stems' headers becomes one front, which knows the launcher of each set.
#undef DF_DECLARE
#define DF_DECLARE(name, Args)                                      \
  namespace df {                                                    \
  DF_ISAS(DF_DECLARE_IN, name, Args)                                \
  template <class T> void name(const Args<T>& args, Stream stream) { \
    using Launcher = void (*)(const Args<T>&, Stream);              \
    constexpr Launcher launchers[] = {DF_ISAS(DF_LAUNCHER, name)};  \
    launchers[current](args, stream);                               \
  }                                                                 \
  DF_INSTANTIATE(name, Args)                                        \
  }
#define DF_DECLARE_IN(set, name, Args) \
  namespace set { template <class T> void name(const Args<T>&, Stream); }
#define DF_LAUNCHER(set, name) set::name<T>,
#define DF_SET(set, ...) set::SET,

namespace df {
namespace {

constexpr InstructionSet SETS[] = {DF_ISAS(DF_SET)};

int best() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();  // this may run before the constructor that does it
#endif
  int last = 0;
  for (int i = 0; i < int(std::size(SETS)); ++i)
    if (SETS[i].runs()) last = i;
  return last;
}
int current = best();  // place in SETS

}  // namespace

int num_threads = 0;

}  // namespace df

#include "kernels.h"

namespace df {

const char* version() { return DF_VERSION; }

const char* isa() { return SETS[current].name; }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const InstructionSet& set : SETS)
    if (set.runs()) names.push_back(set.name);
  return names;
}

void use_isa(const std::string& name) {
  std::string names;
  for (int i = 0; i < int(std::size(SETS)); ++i) {
    if (!SETS[i].runs()) continue;
    if (name == SETS[i].name) {
      current = i;
      return;
    }
    names += (names.empty() ? "" : ", ") + std::string(SETS[i].name);
  }
  throw std::invalid_argument("argument `name`: expected one of this machine's instruction sets, " +
                              names + ", got " + name);
}

int max_threads() {
#ifdef _OPENMP
  return num_threads > 0 ? num_threads : omp_get_max_threads();
#else
  return 1;
#endif
}

void set_num_threads(int n) {
  if (n < 0)
    throw std::invalid_argument("argument `n`: expected 0 (OpenMP's number) or more, got " +
                                std::to_string(n));
  num_threads = n;
}

}  // namespace df
