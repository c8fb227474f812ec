#include "field.h"

#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <sstream>
#include <stdexcept>

namespace {

const std::string MAGIC = "dreamfusion_fast field 1";

[[noreturn]] void fail(const std::string& path, const std::string& what) {
  throw std::runtime_error(path + ": " + what);
}

// Lines "name numbers..." below the magic line, up to an empty line.
class Header {
 public:
  Header(const std::string& path, const std::string& text) : path_(path) {
    std::istringstream lines(text);
    std::string line, name;
    std::getline(lines, line);
    while (std::getline(lines, line)) {
      std::istringstream words(line);
      words >> name;
      for (double x; words >> x;) values_[name].push_back(x);
      if (!words.eof()) fail(path, "line `" + line + "`: expected numbers");
    }
  }
  const std::vector<double>& list(const std::string& name, size_t least, size_t most) const {
    const auto found = values_.find(name);
    const size_t n = found == values_.end() ? 0 : found->second.size();
    if (n < least || n > most)
      fail(path_, "`" + name + "`: expected " + std::to_string(least) + " to " +
                      std::to_string(most) + " numbers, got " + std::to_string(n));
    return found->second;
  }
  // One number; the launchers check nothing, so ranges are checked here.
  double number(const std::string& name, double low, double high) const {
    return in_range(name, list(name, 1, 1)[0], low, high);
  }
  double in_range(const std::string& name, double x, double low, double high) const {
    if (x >= low && x <= high) return x;
    std::ostringstream what;
    what << "`" << name << "`: expected " << low << " to " << high << ", got " << x;
    fail(path_, what.str());
  }

 private:
  std::string path_;
  std::map<std::string, std::vector<double>> values_;
};

void read_grid(const Header& h, Field& f) {
  const auto& resolutions = h.list("resolutions", 1, df::HASH_MAX_LEVELS);
  f.n_levels = int(resolutions.size());
  const auto& offsets = h.list("offsets", resolutions.size() + 1, resolutions.size() + 1);
  h.in_range("offsets", offsets[0], 0, 0);
  for (int l = 0; l < f.n_levels; ++l) {
    f.levels.resolution[l] = int32_t(h.in_range("resolutions", resolutions[l], 1, 1 << 20));
    f.levels.offset[l + 1] =
        int64_t(h.in_range("offsets", offsets[l + 1], offsets[l] + 1, offsets[l] + (1 << 28)));
  }
  f.features = int(h.number("features", 1, 8));
  if (f.features & (f.features - 1)) h.in_range("features", f.features, 8, 8);  // 1, 2, 4 or 8
  f.smoothstep = h.number("smoothstep", 0, 1) != 0;
}

void read_mlp(const Header& h, Field& f) {
  const auto& widths = h.list("widths", 2, df::MLP_MAX_LAYERS + 1);
  f.mlp.n_layers = int(widths.size()) - 1;
  for (size_t i = 0; i < widths.size(); ++i)
    f.mlp.width[i] = int(h.in_range("widths", widths[i], 1, df::MLP_MAX_WIDTH));
  h.in_range("widths", widths.front(), f.n_levels * f.features, f.n_levels * f.features);
  h.in_range("widths", widths.back(), 4, 4);
  f.mlp.silu = h.number("silu", 0, 1) != 0;
}

// Takes n values of T from the front of data[at..].
template <class T>
std::vector<T> take(const std::string& data, size_t& at, size_t n) {
  std::vector<T> values(n);
  std::memcpy(values.data(), data.data() + at, n * sizeof(T));
  at += n * sizeof(T);
  return values;
}

}  // namespace

Field read_field(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(path, "cannot be read");
  const std::string data{std::istreambuf_iterator<char>(file), {}};
  const size_t end = data.find("\n\n");
  if (data.compare(0, MAGIC.size() + 1, MAGIC + "\n") != 0 || end == std::string::npos)
    fail(path, "expected a file of export_field.py, which begins with `" + MAGIC + "`");
  const Header h(path, data.substr(0, end));

  Field f;
  read_grid(h, f);
  read_mlp(h, f);
  f.cone = h.number("cone", 0, 1) != 0;
  f.blob_density = h.number("blob_density", -1e6, 1e6);
  f.blob_size = h.number("blob_size", 1e-6, 1e6);
  f.density_bias = h.number("density_bias", -1e6, 1e6);
  f.log_density_max = h.number("log_density_max", -80, 80);
  f.radius = h.number("radius", 1e-6, 1e6);
  f.step = h.number("step", f.radius * 1e-4, f.radius);
  f.early_stop = h.number("early_stop", 0, 1);
  const auto& backdrop = h.list("backdrop", 3, 3);
  for (int c = 0; c < 3; ++c) f.backdrop[c] = float(h.in_range("backdrop", backdrop[c], 0, 1));
  f.occupancy_resolution = 2 * int(h.number("occupancy_resolution", 2, 1024) / 2);

  const size_t n_table = size_t(f.levels.offset[f.n_levels]) * f.features;
  const size_t n_weights = size_t(df::mlp_parameters(f.mlp));
  const size_t g = size_t(f.occupancy_resolution), n_bytes = g * g * g / 8;
  size_t at = end + 2;
  const size_t want = at + 4 * (n_table + n_weights) + n_bytes;
  if (data.size() != want)
    fail(path, "expected " + std::to_string(want) + " bytes, got " + std::to_string(data.size()));
  f.table = take<float>(data, at, n_table);
  f.weights = take<float>(data, at, n_weights);
  f.bitfield = take<uint8_t>(data, at, n_bytes);
  return f;
}

Field make_field() {
  Field f;
  f.n_levels = 6, f.features = 2, f.smoothstep = true;
  for (int l = 0; l < f.n_levels; ++l) {  // 4, 8, .. 128 cells a side
    const int64_t n = 4 << l, corners = (n + 1) * (n + 1) * (n + 1), most = 1 << 14;
    f.levels.resolution[l] = int32_t(n);
    f.levels.offset[l + 1] = f.levels.offset[l] + (corners < most ? (corners + 7) / 8 * 8 : most);
  }
  f.mlp = {2, {f.n_levels * f.features, 32, 4}, false, false};
  f.cone = true, f.blob_density = 30, f.blob_size = 0.4, f.log_density_max = 8;
  f.radius = 0.75, f.step = 0.0125, f.early_stop = 1e-3;
  for (float& c : f.backdrop) c = 0.5f;

  for (int l = 0; l < f.n_levels; ++l)  // finer levels add less
    for (int64_t i = f.features * f.levels.offset[l]; i < f.features * f.levels.offset[l + 1]; ++i)
      f.table.push_back((2 * df::uniform01(1, uint32_t(i), 0) - 1) * float(std::pow(0.6, l)));
  for (int64_t i = 0; i < df::mlp_parameters(f.mlp); ++i)
    f.weights.push_back((2 * df::uniform01(2, uint32_t(i), 0) - 1) * 1.5f);
  f.occupancy_resolution = 32;
  f.bitfield.assign(32 * 32 * 32 / 8, 255);  // look everywhere
  return f;
}
