#pragma once

#include <string>

namespace fastconv::cuda {

// `text` as a JSON string; it has no control characters.
inline std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c;
  }
  return result + '"';
}

}  // namespace fastconv::cuda
