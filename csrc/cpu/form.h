// Names of the forms, as the operators take them.
#pragma once

#include <c10/util/Exception.h>

#include <cape/shapes.h>

#include <string_view>

namespace cape {

inline Form form_of(std::string_view name) {
  constexpr std::string_view names[] = {"auto", "direct", "gram", "shifted", "winograd", "channelwise", "narrow"};
  for (int i = 0; i < 7; ++i) {
    if (name == names[i]) return static_cast<Form>(i);
  }
  TORCH_CHECK(false, "cape: unknown form '", name,
              "'; known are auto, direct, gram, shifted, winograd, channelwise and narrow.");
}

}  // namespace cape
