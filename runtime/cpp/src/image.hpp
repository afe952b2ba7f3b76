// An image -> pixel_values; the vision encoder's features -> the image's rows in the prompt. The C++ side of
// runtime/image.py. pixel_values equal Python's bit for bit: the resampling below is Pillow's fixed-point arithmetic
// (libImaging/Resample.c), and the floating-point steps are numpy's in the same order.
//
// ImageSpec.kind selects a function of `cuts`, which cuts an image into tiles. ImageSpec.tile_separators are the token
// ids around and between the tiles' rows. `anyres` is LLaVA-OneVision's and LLaVA-NeXT's:
//
//     one image  ->  a base tile (the whole picture, squeezed) + a grid of tiles (at the best pinpoint, padded)
//     features   ->  base rows, then the grid row by row without its padding, a newline row after each
//     several    ->  one square tile each, one newline row after it; with AnyresSpec.each as if each were alone
//
// `native` is Qwen2-VL's: a picture is scaled to whole tiles at about its own size, and the graph makes a row of each.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "digest.hpp"
#include "errors.hpp"
#include "manifest.hpp"
#include "picture.hpp"

namespace autosteer {

/// An image's pixels, which those that mention it share.
using Pixels = std::shared_ptr<const Image>;

/// A file, or pixels.
using ImageLike = std::variant<std::filesystem::path, Pixels>;

constexpr int64_t kMaxSquare = 2 * picture::kMaxPixels;  // of a picture that is padded

/// Rows of floats (n, width), one after the other.
struct Rows {
  int64_t width = 0;
  std::vector<float> data;

  int64_t count() const { return width ? static_cast<int64_t>(data.size()) / width : 0; }
  const float* row(int64_t i) const { return data.data() + i * width; }
  float* row(int64_t i) { return data.data() + i * width; }
  void append(const float* rows, int64_t n) { data.insert(data.end(), rows, rows + n * width); }
};

/// Open an image and turn it upright. Throws InputError if it is unusable.
inline Pixels open_image(const ImageLike& image) {
  const auto* path = std::get_if<std::filesystem::path>(&image);
  Pixels pixels = path ? std::make_shared<const Image>(read_picture(*path)) : std::get<Pixels>(image);
  const auto [height, width] = std::pair(pixels->height, pixels->width);
  const size_t size = pixels->rgb.size();
  if (height < 1 || width < 1 || size / 3 / static_cast<size_t>(width) != static_cast<size_t>(height) ||
      size % (3 * static_cast<size_t>(width))) {
    throw InputError("image: expected 3 * width * height bytes");
  }
  if (const std::string refusal = picture::wrong_shape(height, width); !refusal.empty()) throw InputError(refusal);
  return pixels;
}

/// SHA-256 of pictures, as if each were a PPM file: `pngtopnm photo.png | sha256sum`.
inline std::string digest(const Image* images, size_t count) {
  Sha256 hash;
  for (const Image* image = images; image < images + count; ++image) {
    const std::string head = "P6\n" + std::to_string(image->width) + " " + std::to_string(image->height) + "\n255\n";
    hash.add(head.data(), head.size());
    hash.add(image->rgb.data(), image->rgb.size());
  }
  return hash.hex();
}

// --- Pillow's resampling ---

namespace resampling {

constexpr int kPrecisionBits = 32 - 8 - 2;  // 8 bits of result, 2 for sums of negative lobes

struct Filter {
  double (*weight)(double);
  double support;
  bool narrow = false;  // torchvision's arithmetic: weights of 16 bits, with as many fraction bits as fit
};

inline double bilinear(double x) {
  return std::max(1.0 - std::abs(x), 0.0);
}

inline double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

inline double sinc(double x) {
  constexpr double pi = 3.14159265358979323846;
  return x == 0.0 ? 1.0 : std::sin(x * pi) / (x * pi);
}

inline double lanczos(double x) {
  return -3.0 <= x && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0;
}

inline Filter filter(const std::string& name) {
  if (name == "bilinear") return {bilinear, 1.0};
  if (name == "lanczos") return {lanczos, 3.0};
  return {bicubic, 2.0};
}

/// The pixels that make one pixel of the result, and their weights in fixed point.
struct Window {
  int64_t first;
  std::vector<int32_t> weights;
};

/// A window for each pixel along an axis of the result, and the number of fraction bits of the weights.
struct Axis {
  std::vector<Window> windows;
  int bits = kPrecisionBits;
};

/// `target` pixels along an axis of `source` pixels (Pillow: precompute_coeffs, normalize_coeffs_8bpc; ATen:
/// compute_index_ranges_int16_weights).
inline Axis axis(int64_t source, int64_t target, const Filter& filter) {
  const double scale = static_cast<double>(source) / static_cast<double>(target);
  const double stretch = std::max(scale, 1.0);  // shrinking averages over all pixels: antialiasing
  const double support = filter.support * stretch;
  std::vector<std::pair<int64_t, std::vector<double>>> exact;  // first pixel, weights
  double largest = 0.0;
  for (int64_t i = 0; i < target; ++i) {
    const double centre = (static_cast<double>(i) + 0.5) * scale;
    const int64_t first = std::max<int64_t>(static_cast<int64_t>(centre - support + 0.5), 0);
    const int64_t last = std::min<int64_t>(static_cast<int64_t>(centre + support + 0.5), source);
    double sum = 0.0;
    std::vector<double> weights;
    for (int64_t x = first; x < last; ++x) {
      weights.push_back(filter.weight((static_cast<double>(x) - centre + 0.5) * (1.0 / stretch)));
      sum += weights.back();
    }
    for (double& weight : weights) {
      if (sum != 0.0) weight /= sum;
      largest = std::max(largest, weight);
    }
    exact.emplace_back(first, std::move(weights));
  }
  Axis out;
  if (filter.narrow) {
    out.bits = 0;
    while (out.bits < kPrecisionBits && static_cast<int>(0.5 + largest * (2 << out.bits)) < 1 << 15) ++out.bits;
  }
  for (const auto& [first, weights] : exact) {
    Window window{first, {}};
    for (const double weight : weights) {
      window.weights.push_back(static_cast<int32_t>((weight < 0 ? -0.5 : 0.5) + weight * (1 << out.bits)));
    }
    out.windows.push_back(std::move(window));
  }
  return out;
}

/// A byte of the result: those `step` bytes apart from `first` on, each times its weight of `bits` fraction bits.
inline uint8_t blend(const uint8_t* first, int64_t step, const std::vector<int32_t>& weights, int bits) {
  int32_t sum = 1 << (bits - 1);
  for (size_t k = 0; k < weights.size(); ++k) sum += first[static_cast<int64_t>(k) * step] * weights[k];
  return static_cast<uint8_t>(std::clamp(sum >> bits, 0, 255));
}

inline Image resize_width(const Image& image, int64_t width, const Filter& filter) {
  const auto [windows, bits] = axis(image.width, width, filter);
  Image out{image.height, width, std::vector<uint8_t>(static_cast<size_t>(3 * image.height * width))};
  for (int64_t y = 0; y < out.height; ++y) {
    for (int64_t x = 0; x < width; ++x) {
      const Window& window = windows[static_cast<size_t>(x)];
      for (int c = 0; c < 3; ++c) out.at(y, x)[c] = blend(image.at(y, window.first) + c, 3, window.weights, bits);
    }
  }
  return out;
}

inline Image resize_height(const Image& image, int64_t height, const Filter& filter) {
  const auto [windows, bits] = axis(image.height, height, filter);
  Image out{height, image.width, std::vector<uint8_t>(static_cast<size_t>(3 * height * image.width))};
  for (int64_t y = 0; y < height; ++y) {
    const Window& window = windows[static_cast<size_t>(y)];
    const uint8_t* first = image.at(window.first, 0);
    for (int64_t x = 0; x < 3 * out.width; ++x) {
      out.rgb[static_cast<size_t>(3 * y * out.width + x)] = blend(first + x, 3 * image.width, window.weights, bits);
    }
  }
  return out;
}

/// Nearest neighbour, stepping along both axes as Pillow does (ImagingScaleAffine).
inline Image nearest(const Image& image, int64_t height, int64_t width) {
  const auto steps = [](int64_t source, int64_t target) {
    std::vector<int64_t> at;
    const double step = static_cast<double>(source) / static_cast<double>(target);
    double position = step * 0.5;
    for (int64_t i = 0; i < target; ++i, position += step) at.push_back(static_cast<int64_t>(position));
    return at;
  };
  const auto ys = steps(image.height, height), xs = steps(image.width, width);
  Image out{height, width, std::vector<uint8_t>(static_cast<size_t>(3 * height * width))};
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width; ++x) {
      const int64_t from_y = std::min(ys[static_cast<size_t>(y)], image.height - 1);
      const int64_t from_x = std::min(xs[static_cast<size_t>(x)], image.width - 1);
      std::memcpy(out.at(y, x), image.at(from_y, from_x), 3);
    }
  }
  return out;
}

}  // namespace resampling

/// Pillow's Image.resize((width, height), resample).
inline Image resize(const Image& image, int64_t height, int64_t width, const std::string& resample) {
  if (resample == "nearest") return resampling::nearest(image, height, width);
  const resampling::Filter filter = resampling::filter(resample);
  const auto across = [&](const Image& in) {
    return width == in.width ? in : resampling::resize_width(in, width, filter);
  };
  const auto down = [&](const Image& in) {
    return height == in.height ? in : resampling::resize_height(in, height, filter);
  };
  // Pillow 13 begins with the axis that shrinks the work; each pass rounds to bytes, so the order changes the pixels.
  const bool down_first = image.height - height > std::max<int64_t>(2 * (image.width - width), 0);
  return down_first ? across(down(image)) : down(across(image));
}

// --- tiles ---

/// The (height, width) that keeps most of the picture and wastes least (HF: select_best_resolution).
inline std::array<int64_t, 2> best_pinpoint(int64_t height, int64_t width, const AnyresSpec& spec) {
  std::array<int64_t, 2> best{};
  std::pair<int64_t, int64_t> best_fit{-1, 0};  // pixels kept, pixels wasted (negative)
  for (const auto& pinpoint : spec.grid_pinpoints) {
    const double scale = std::min(static_cast<double>(pinpoint[1]) / static_cast<double>(width),
                                  static_cast<double>(pinpoint[0]) / static_cast<double>(height));
    const int64_t scaled = static_cast<int64_t>(static_cast<double>(width) * scale) *
                           static_cast<int64_t>(static_cast<double>(height) * scale);
    const int64_t kept = std::min(scaled, width * height);
    const std::pair fit{kept, kept - pinpoint[0] * pinpoint[1]};
    if (best_fit.first < 0 || fit > best_fit) {  // the first of equals, as HF
      best = pinpoint;
      best_fit = fit;
    }
  }
  return best;
}

/// Copy `image` into `target` with its corner at (top, left).
inline void paste(const Image& image, Image& target, int64_t top, int64_t left) {
  for (int64_t y = 0; y < image.height; ++y) {
    std::memcpy(target.at(top + y, left), image.at(y, 0), static_cast<size_t>(3 * image.width));
  }
}

/// The tiles of a picture, and their TileSeparators::grid.
struct Tiles {
  std::vector<Image> images;
  std::array<int64_t, 2> grid{1, 1};
};

/// The whole picture as one tile.
inline Image squeezed(const Image& image, const ImageSpec& spec) {
  return resize(image, spec.tile_size, spec.tile_size, spec.resample);
}

/// Pad with the mean colour to a square, which becomes one tile (HF: LlavaImageProcessorPil with do_pad).
inline Tiles pad_to_square(const Image& image, const ImageSpec& spec, bool) {
  const int64_t side = std::max(image.height, image.width);
  if (side > kMaxSquare / side) {
    throw InputError("image of " + std::to_string(image.width) + "x" + std::to_string(image.height) +
                     " pixels: padded to a square it has more than " + std::to_string(kMaxSquare));
  }
  Image square{side, side, std::vector<uint8_t>(static_cast<size_t>(3 * side * side))};
  for (size_t i = 0; i < square.rgb.size(); ++i) {
    square.rgb[i] = static_cast<uint8_t>(static_cast<int>(spec.mean[i % 3] * 255));
  }
  paste(image, square, (side - image.height) / 2, (side - image.width) / 2);
  return {{squeezed(square, spec)}};
}

/// The rectangle (height, width) of `image` whose corner is at (top, left).
inline Image cut(const Image& image, int64_t top, int64_t left, int64_t height, int64_t width) {
  Image out{height, width, std::vector<uint8_t>(static_cast<size_t>(3 * height * width))};
  for (int64_t y = 0; y < height; ++y) {
    std::memcpy(out.at(y, 0), image.at(top + y, left), static_cast<size_t>(3 * width));
  }
  return out;
}

/// Cut a picture of whole tiles, row by row, behind those in `tiles`.
inline void cut_tiles(const Image& image, const ImageSpec& spec, std::vector<Image>& tiles) {
  const int64_t n = spec.tile_size;
  for (int64_t y = 0; y < image.height; y += n) {
    for (int64_t x = 0; x < image.width; x += n) tiles.push_back(cut(image, y, x, n, n));
  }
}

/// Scale the shortest side to tile_size and keep the middle of the other (HF: ChameleonImageProcessorPil).
inline Tiles centre_crop(const Image& image, const ImageSpec& spec, bool) {
  const int64_t size = spec.tile_size, shortest = std::min(image.height, image.width);
  const auto scaled = [&](int64_t side) {
    return static_cast<int64_t>(static_cast<double>(size * side) / static_cast<double>(shortest));
  };
  const int64_t height = scaled(image.height), width = scaled(image.width);
  const Image scaled_picture = resize(image, height, width, spec.resample);
  return {{cut(scaled_picture, (height - size) / 2, (width - size) / 2, size, size)}};
}

inline Tiles anyres_tiles(const Image& image, const ImageSpec& spec, bool alone) {
  const AnyresSpec& anyres = spec.anyres.value();
  if (!(alone || anyres.each) || anyres.grid_pinpoints.empty()) return pad_to_square(image, spec, alone);
  const auto [height, width] = best_pinpoint(image.height, image.width, anyres);
  const double scale_h = static_cast<double>(height) / static_cast<double>(image.height);
  const double scale_w = static_cast<double>(width) / static_cast<double>(image.width);
  int64_t fitted_h = height, fitted_w = width;
  if (scale_w < scale_h) {
    fitted_h = std::min(static_cast<int64_t>(std::ceil(static_cast<double>(image.height) * scale_w)), height);
  } else {
    fitted_w = std::min(static_cast<int64_t>(std::ceil(static_cast<double>(image.width) * scale_h)), width);
  }
  Image padded{height, width, std::vector<uint8_t>(static_cast<size_t>(3 * height * width))};
  paste(resize(image, fitted_h, fitted_w, spec.resample), padded, (height - fitted_h) / 2, (width - fitted_w) / 2);
  Tiles tiles{{squeezed(image, spec)}};  // grid 1x1: `pack` joins the tiles into one run
  cut_tiles(padded, spec, tiles.images);
  return tiles;
}

/// Scale to the longest edge, stretch to whole tiles and cut. The whole image comes last, squeezed into one tile (HF:
/// Idefics3ImageProcessorPil).
inline Tiles split_tiles(const Image& image, const ImageSpec& spec, bool) {
  const int64_t n = spec.tile_size, edge = spec.split.value().longest_edge;
  const auto ratio = [](const Image& of) { return static_cast<double>(of.width) / static_cast<double>(of.height); };
  const auto tiles_for = [&](double pixels) {
    return (static_cast<int64_t>(pixels) + n - 1) / n;  // whole pixels, then whole tiles
  };
  const double r = ratio(image), long_edge = static_cast<double>(edge);
  int64_t even = static_cast<int64_t>(r >= 1 ? long_edge / r : long_edge * r);
  even = std::max<int64_t>(even + even % 2, 1);
  const Image scaled = r >= 1 ? resize(image, even, edge, spec.resample) : resize(image, edge, even, spec.resample);
  if (!spec.split->tiles) return {{squeezed(scaled, spec)}};
  int64_t rows = (scaled.height + n - 1) / n, columns = (scaled.width + n - 1) / n;
  if (scaled.width >= scaled.height) {
    rows = tiles_for(static_cast<double>(columns * n) / ratio(scaled));
  } else {
    columns = tiles_for(static_cast<double>(rows * n) * ratio(scaled));
  }
  const Image stretched = resize(scaled, rows * n, columns * n, spec.resample);
  if (rows == 1 && columns == 1) return {{stretched}};
  Tiles tiles{{}, {rows, columns}};
  cut_tiles(stretched, spec, tiles.images);
  tiles.images.push_back(squeezed(stretched, spec));
  return tiles;
}

/// Stretch to the grid whose shape is closest, and cut. The whole image comes last, squeezed into one tile (HF:
/// GotOcr2ImageProcessorPil with crop_to_patches). Its grids are in the order of their tiles, then of their columns.
inline Tiles closest_grid(const Image& image, const ImageSpec& spec, bool) {
  const ClosestGridSpec& limits = spec.closest_grid.value();
  const auto width = static_cast<double>(image.width), height = static_cast<double>(image.height);
  int64_t best_columns = 1, best_rows = 1;
  double off = std::numeric_limits<double>::infinity();
  for (int64_t n = limits.min_tiles; n <= limits.max_tiles; ++n) {
    for (int64_t columns = 1; columns <= n; ++columns) {
      if (n % columns) continue;
      const int64_t rows = n / columns;
      const double distance = std::abs(width / height - static_cast<double>(columns) / static_cast<double>(rows));
      const auto area = static_cast<double>(spec.tile_size * spec.tile_size * n);
      const bool large = width * height > 0.5 * area;  // enough of a picture for so many tiles
      if (distance < off || (distance == off && large)) {
        best_columns = columns;
        best_rows = rows;
        off = distance;
      }
    }
  }
  const int64_t n = spec.tile_size;
  Tiles tiles;  // grid 1x1: the rows of all tiles are one run
  cut_tiles(resize(image, best_rows * n, best_columns * n, spec.resample), spec, tiles.images);
  if (best_rows * best_columns > 1) tiles.images.push_back(squeezed(image, spec));
  return tiles;
}

/// Rows and columns of tiles for `count` pictures of `size` (height, width), all alike, that have `least` to `most`
/// pixels together (HF: smart_resize). `counted`: the pictures that are taken into account where sides are rounded.
inline std::array<int64_t, 2> whole_tiles(const std::array<int64_t, 2>& size, int64_t tile, int64_t least, int64_t most,
                                          int64_t count = 1, int64_t counted = 1) {
  const std::array<double, 2> sides = {static_cast<double>(size[0]), static_cast<double>(size[1])};
  const auto n = static_cast<double>(tile), area = static_cast<double>(count * size[0] * size[1]);
  const auto tiles = [&](const auto& along) {
    return std::array<int64_t, 2>{static_cast<int64_t>(along(sides[0])), static_cast<int64_t>(along(sides[1]))};
  };
  const auto grid = tiles([&](double side) { return std::nearbyint(side / n); });  // half to even, as Python
  const int64_t pixels = counted * (grid[0] * tile * grid[1] * tile);
  if (pixels > most) {
    const double shrink = std::sqrt(area / static_cast<double>(most));
    return tiles([&](double side) { return std::max(1.0, std::floor(side / shrink / n)); });
  }
  if (pixels < least) {
    const double enlarge = std::sqrt(static_cast<double>(least) / area);
    return tiles([&](double side) { return std::ceil(side * enlarge / n); });
  }
  return grid;
}

/// How many rows and columns of tiles a `native` picture becomes.
inline std::array<int64_t, 2> native_grid(int64_t height, int64_t width, const ImageSpec& spec) {
  return whole_tiles({height, width}, spec.tile_size, spec.native.value().min_pixels, spec.native->max_pixels);
}

/// The whole picture, as often as the graph reads frames (HF: Qwen2VLImageProcessorPil).
inline Tiles whole(const Image& image, const ImageSpec& spec, bool) {
  const auto grid = native_grid(image.height, image.width, spec);
  const Image scaled = resize(image, grid[0] * spec.tile_size, grid[1] * spec.tile_size, spec.resample);
  return {std::vector<Image>(static_cast<size_t>(spec.native->frames), scaled), grid};
}

/// `spec` that cuts a picture into at most `tiles` tiles. `anyres` and `closest_grid` lose the grids of more, the base
/// tile included; if none is left, a picture becomes one tile, like each of several pictures. `native` scales to fewer
/// pixels; a long narrow picture may still take a tile for each of its sides' ratio. The others are as they were.
inline ImageSpec at_most(ImageSpec spec, std::optional<int64_t> tiles) {
  if (!tiles || !(spec.anyres || spec.closest_grid || spec.native)) return spec;
  if (*tiles < 1) {
    throw OptionError("max_tiles", " = " + std::to_string(*tiles) + ": a picture takes at least one tile");
  }
  if (spec.closest_grid) {
    spec.closest_grid->max_tiles = std::min(spec.closest_grid->max_tiles, std::max<int64_t>(*tiles - 1, 1));
    return spec;
  }
  if (spec.native) {
    const int64_t area = spec.tile_size * spec.tile_size, most = spec.native->max_pixels;
    if (*tiles <= most / area) spec.native->max_pixels = *tiles * area;  // the product may be too large for 64 bits
    spec.native->min_pixels = std::min(spec.native->min_pixels, spec.native->max_pixels);
    return spec;
  }
  auto& grids = spec.anyres->grid_pinpoints;
  const int64_t area = spec.tile_size * spec.tile_size;
  const auto too_many = [&](const auto& grid) { return grid[0] * grid[1] / area + 1 > *tiles; };
  grids.erase(std::remove_if(grids.begin(), grids.end(), too_many), grids.end());
  return spec;
}

using Cut = Tiles (*)(const Image&, const ImageSpec&, bool alone);

/// By ImageSpec.kind.
inline const std::map<std::string, Cut>& cuts() {
  static const std::map<std::string, Cut> functions = {
      {"anyres", anyres_tiles},
      {"centre_crop", centre_crop},
      {"closest_grid", closest_grid},
      {"native", whole},
      {"pad_to_square", pad_to_square},
      {"split", split_tiles}};
  return functions;
}

/// An image -> its tiles (tile_size, tile_size), and their grid. `alone`: it is the prompt's only image. `anyres` makes
/// one tile of each of several. A `native` picture is cut by the graph: here it is whole, as often as the graph reads
/// frames.
inline Tiles cut(const Image& image, const ImageSpec& spec, bool alone) {
  return cuts().at(spec.kind)(image, spec, alone);
}

/// Tiles of one size -> pixel_values, one row (3 * height * width) for each. `spec`: an ImageSpec or a VideoSpec.
template <class Spec>
Rows normalise(const std::vector<Image>& tiles, const Spec& spec) {
  std::array<std::array<float, 256>, 3> value{};  // what each byte of each channel becomes
  for (size_t c = 0; c < 3; ++c) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const auto scaled = static_cast<float>(static_cast<double>(byte) * spec.rescale_factor);
      value[c][byte] = (scaled - static_cast<float>(spec.mean[c])) / static_cast<float>(spec.std[c]);
    }
  }
  Rows pixel_values{static_cast<int64_t>(tiles.at(0).rgb.size()), {}};
  for (const Image& tile : tiles) {
    for (size_t c = 0; c < 3; ++c) {
      for (size_t i = c; i < tile.rgb.size(); i += 3) pixel_values.data.push_back(value[c][tile.rgb[i]]);
    }
  }
  return pixel_values;
}

/// An image -> pixel_values; see `cut`.
inline Rows prepare(const Image& image, const ImageSpec& spec, bool alone) {
  return normalise(cut(image, spec, alone).images, spec);
}

// --- features to rows ---

/// Python's int(round(x, 7)): correctly rounded to seven decimals, then truncated.
inline int64_t rounded(double x) {
  char text[64];
  std::snprintf(text, sizeof text, "%.7f", x);
  return std::strtoll(text, nullptr, 10);
}

/// A grid of rows (height, width, D).
struct Grid {
  int64_t height = 0, width = 0;
  Rows cells;
};

/// Drop the rows or columns that are padding (HF: unpad_image). `height`, `width`: the original picture's.
inline Grid unpad(const Grid& grid, int64_t height, int64_t width) {
  const double wide = static_cast<double>(width) / static_cast<double>(height);
  int64_t top = 0, left = 0;
  if (wide > static_cast<double>(grid.width) / static_cast<double>(grid.height)) {
    const double scale = static_cast<double>(grid.width) / static_cast<double>(width);
    top = (grid.height - rounded(static_cast<double>(height) * scale)) / 2;
  } else {
    const double scale = static_cast<double>(grid.height) / static_cast<double>(height);
    left = (grid.width - rounded(static_cast<double>(width) * scale)) / 2;
  }
  Grid out{grid.height - 2 * top, grid.width - 2 * left, {grid.cells.width, {}}};
  for (int64_t y = top; y < grid.height - top; ++y) {
    out.cells.append(grid.cells.row(y * grid.width + left), out.width);
  }
  return out;
}

/// Resize as torch's interpolate(mode="bilinear", align_corners=False) does, without antialiasing.
inline Grid bilinear(const Grid& grid, int64_t height, int64_t width) {
  struct Tap {
    int64_t low, high;
    float part;  // of `high`
  };
  const auto axis = [](int64_t source, int64_t target) {
    std::vector<Tap> taps;
    const auto step = static_cast<float>(static_cast<double>(source) / static_cast<double>(target));
    for (int64_t i = 0; i < target; ++i) {
      const float position = std::max((static_cast<float>(i) + 0.5F) * step - 0.5F, 0.0F);
      const auto low = static_cast<int64_t>(position);
      taps.push_back({low, std::min(low + 1, source - 1), position - static_cast<float>(low)});
    }
    return taps;
  };
  const auto ys = axis(grid.height, height), xs = axis(grid.width, width);
  const int64_t depth = grid.cells.width;
  Grid out{height, width, {depth, std::vector<float>(static_cast<size_t>(height * width * depth))}};
  float* cell = out.cells.data.data();
  for (const Tap& y : ys) {
    for (const Tap& x : xs) {
      for (int64_t d = 0; d < depth; ++d) {
        const auto column = [&](int64_t at) {
          return grid.cells.row(y.low * grid.width + at)[d] * (1 - y.part) +
                 grid.cells.row(y.high * grid.width + at)[d] * y.part;
        };
        *cell++ = column(x.low) * (1 - x.part) + column(x.high) * x.part;
      }
    }
  }
  return out;
}

/// image_features (tiles * side * side, D) and image_newline (D,) -> the image's rows, in token order.
/// `height`, `width`: the original picture's.
inline Rows pack(const Rows& features, const Rows& newline, int64_t height, int64_t width, const ImageSpec& spec) {
  const AnyresSpec& anyres = spec.anyres.value();
  const int64_t side = anyres.tokens_per_side, tile = side * side;
  Rows out{features.width, {}};
  out.append(features.row(0), tile);
  if (features.count() == tile) {
    out.append(newline.row(0), 1);
    return out;
  }
  const auto pinpoint = best_pinpoint(height, width, anyres);
  const int64_t rows = pinpoint[0] / spec.tile_size, columns = pinpoint[1] / spec.tile_size;
  Grid grid{rows * side, columns * side, {features.width, {}}};
  for (int64_t y = 0; y < grid.height; ++y) {
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t before = 1 + (y / side) * columns + column;  // tiles, the base one included
      grid.cells.append(features.row(before * tile + (y % side) * side), side);
    }
  }
  grid = unpad(grid, height, width);
  const double ratio =
      std::sqrt(static_cast<double>(grid.height * grid.width) / static_cast<double>(anyres.max_tiles_side * tile));
  if (ratio > 1.1) {
    // Python's length // ratio. std::floor(length / ratio) differs: a quotient just below 81 is rounded to 81 first.
    const auto shrunk = [&](int64_t length) {
      const auto dividend = static_cast<double>(length);
      return static_cast<int64_t>(std::lround((dividend - std::fmod(dividend, ratio)) / ratio));
    };
    grid = bilinear(grid, shrunk(grid.height), shrunk(grid.width));
  }
  for (int64_t y = 0; y < grid.height; ++y) {
    out.append(grid.cells.row(y * grid.width), grid.width);
    out.append(newline.row(0), 1);
  }
  return out;
}

/// A run of token ids, or of rows of an image.
struct Laid {
  std::vector<int64_t> ids;
  Rows rows;
};

/// Runs of an image's rows -> the same with the token ids around and between them. Throws PackageError if
/// ImageSpec.tile_separators has no entry for `grid`, or one for another number of runs.
inline std::vector<Laid> lay_out(std::vector<Rows> runs, const std::array<int64_t, 2>& grid, const ImageSpec& spec) {
  std::vector<std::vector<int64_t>> separators(spec.tile_separators.empty() ? runs.size() + 1 : 0);
  for (const TileSeparators& known : spec.tile_separators) {
    if (known.grid == grid) separators = known.token_ids;
  }
  if (separators.size() != runs.size() + 1) {
    throw PackageError("image: no tile_separators for " + std::to_string(runs.size()) + " runs of rows in a grid of " +
                       std::to_string(grid[0]) + "x" + std::to_string(grid[1]) + " tiles");
  }
  std::vector<Laid> laid;
  for (size_t i = 0; i < separators.size(); ++i) {
    if (!separators[i].empty()) laid.push_back({separators[i], {}});
    if (i < runs.size()) laid.push_back({{}, std::move(runs[i])});
  }
  return laid;
}

}  // namespace autosteer
