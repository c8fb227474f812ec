// A radiance field as dreamfusion_fast.field.Field trains it: hash grid, MLP, density blob, and the
// occupancy grid that says where to look. All that render.cpp needs to know of a scene.
#pragma once

#include <dreamfusion_fast/kernels.h>

#include <cstdint>
#include <string>
#include <vector>

struct Field {
  df::HashLevels levels{};
  int n_levels = 0, features = 0;
  bool smoothstep = false;
  df::MlpShape mlp{};                    // n_levels * features in, log density and colour out
  std::vector<float> table;              // (rows, features)
  std::vector<float> weights;            // (mlp_parameters,)
  bool cone = false;                     // shape of the blob, else Gaussian
  double blob_density = 0, blob_size = 1, density_bias = 0, log_density_max = 0;
  double radius = 0;                     // of the sphere that holds the scene, scene units
  double step = 0;                       // of the march, scene units
  double early_stop = 0;                 // transmittance at which a ray ends
  float backdrop[3] = {};                // colour behind the scene
  int occupancy_resolution = 0;
  std::vector<uint8_t> bitfield;         // (occupancy_resolution^3 / 8,)
};

// The file that export_field.py wrote. Throws std::runtime_error, which says what was expected.
Field read_field(const std::string& path);

// A lumpy ball of random colours, for those who have no file yet.
Field make_field();
