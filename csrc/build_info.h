#pragma once

namespace fastconv {

// What this library was built from and for: a mark, then JSON. The build writes the definition.
extern const char kBuildInfo[];

}  // namespace fastconv
