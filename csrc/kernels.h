// What a program includes to call the CPU kernels: every stem's Args structs and launchers, and the
// settings. A launcher df::X(args) runs on the best instruction set that the machine has. It checks
// nothing but what its header says, allocates nothing, and returns when its results are written.
// docs/cpp.md tells more. (bindings.cpp calls the CUDA kernels in the same way: DF_ISA=cuda.)
#pragma once

#include <string>
#include <vector>

#include "adam.h"
#include "composite.h"
#include "frequency_encode.h"
#include "hash_encode.h"
#include "march.h"
#include "mlp.h"
#include "occupancy.h"
#include "radiance.h"
#include "rays.h"
#include "spherical_harmonics.h"

#ifdef DF_IS_HOST
namespace df {

const char* version();  // of the library that is linked, as in Python: dreamfusion_fast.__version__

// The instruction set in use (chosen when the program starts), all that this machine can use (the
// best last), and another choice, for tests and benches; no kernel may be running. Throws
// std::invalid_argument for a name that is not among isas().
const char* isa();
std::vector<std::string> isas();
void use_isa(const std::string& name);

// Threads the kernels run on; 0 (as at start): as many as OpenMP is set to. Throws
// std::invalid_argument below 0.
int max_threads();
void set_num_threads(int n);

}  // namespace df
#endif
