// Writes a PNG without compression: deflate's stored blocks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace png {

inline void put32(std::string& to, uint32_t x) {  // most significant byte first
  for (int shift = 24; shift >= 0; shift -= 8) to += char(x >> shift & 255);
}

inline void put_chunk(std::string& to, std::string body) {  // body: four letters, then data
  uint32_t crc = ~0u;
  for (unsigned char byte : body) {
    crc ^= byte;
    for (int k = 0; k < 8; ++k) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
  }
  put32(to, uint32_t(body.size() - 4));
  to += body;
  put32(to, ~crc);
}

// rgb: (height, width, 3), the top row first. Throws std::runtime_error if it cannot be written.
inline void write(const std::string& path, const std::vector<uint8_t>& rgb, int width, int height) {
  std::string rows, data = "IDAT\x78\x01";
  for (int i = 0; i < height; ++i) {
    rows += '\0';  // no filter
    rows.append(reinterpret_cast<const char*>(&rgb[size_t(i) * width * 3]), size_t(width) * 3);
  }
  uint32_t a = 1, b = 0;  // Adler-32
  for (unsigned char byte : rows) a = (a + byte) % 65521, b = (b + a) % 65521;
  for (size_t at = 0; at < rows.size(); at += 65535) {
    const unsigned n = unsigned(std::min<size_t>(65535, rows.size() - at));
    data += char(at + n == rows.size());  // the last block
    for (unsigned x : {n, ~n}) data += char(x & 255), data += char(x >> 8 & 255);
    data.append(rows, at, n);
  }
  put32(data, b << 16 | a);

  std::string header = "IHDR", file = "\x89PNG\r\n\x1a\n";
  put32(header, uint32_t(width));
  put32(header, uint32_t(height));
  header.append("\x08\x02\x00\x00\x00", 5);  // 8 bits, RGB
  put_chunk(file, header);
  put_chunk(file, data);
  put_chunk(file, "IEND");
  std::ofstream out(path, std::ios::binary);
  if (!out.write(file.data(), std::streamsize(file.size())).flush())
    throw std::runtime_error(path + ": cannot be written");
}

}  // namespace png
