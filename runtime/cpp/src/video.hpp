// A video -> pixel_values; its frames' features -> the video's rows in the prompt. The C++ side of runtime/video.py.
//
// With `anyres` pictures (LLaVA-OneVision):
//
//     frames    ->  one tile each, squeezed
//     features  ->  each frame's rows pooled, frame after frame, and one newline row at the very end
//
// With `native` ones (Qwen2-VL): frames are scaled to whole tiles, all alike. The graph reads groups of successive
// frames as one, and makes a row of each tile. A group stands in time by its position, or by text before it.
//
// Frames are resized as torchvision does, like in Hugging Face's video processor; Pillow's pixels differ.
#pragma once

#include <algorithm>
#include <array>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "ffmpeg.hpp"
#include "image.hpp"
#include "unicode.hpp"

namespace autosteer {

constexpr int64_t kFrames = 8;             // taken from a video by default
constexpr double kFramesPerSecond = 24;    // where nothing says when a frame is shown
constexpr double kMaxSeconds = 1'000'000;

/// A video among a turn's parts: its frames.
struct VideoPart {
  std::vector<ImageLike> frames;
  std::vector<double> seconds = {};  ///< from its beginning, one for each frame; none: kFramesPerSecond
};

/// Indices of `count` frames out of `total`, evenly spaced from the first to the last; all if there are not more.
inline std::vector<int64_t> spaced(int64_t total, int64_t count) {
  count = std::min(total, count);
  std::vector<int64_t> chosen;
  for (int64_t i = 0; i < count; ++i) chosen.push_back(i * (total - 1) / std::max<int64_t>(count - 1, 1));
  return chosen;
}

namespace video {

/// Order of names with their numbers as numbers: 2.png comes before 10.png.
inline bool before(const std::string& a, const std::string& b) {
  size_t i = 0, j = 0;
  const auto number = [](const std::string& text, size_t& at) {  // without leading zeros, the longer number is larger
    while (at < text.size() && text[at] == '0') ++at;
    const size_t first = at;
    while (at < text.size() && is_digit(text[at])) ++at;
    return std::pair(at - first, text.substr(first, at - first));
  };
  const auto words = [](const std::string& text, size_t& at) {
    const size_t first = at;
    while (at < text.size() && !is_digit(text[at])) ++at;
    return text.substr(first, at - first);
  };
  while (i < a.size() || j < b.size()) {
    const std::string left = words(a, i), right = words(b, j);
    if (left != right) return left < right;
    if (i == a.size() || j == b.size()) {
      if (i == a.size() && j == b.size()) break;
      return i == a.size();
    }
    const auto low = number(a, i), high = number(b, j);
    if (low != high) return low < high;
  }
  return a < b;
}

/// The frames of a video file, decoded by ffmpeg.
inline VideoPart of_file(const std::filesystem::path& path, int64_t frames) {
  VideoPart found;
  try {
    const ffmpeg::VideoFile opened(ffmpeg::open_regular(path));
    const std::vector<double> seconds = opened.seconds();
    const std::vector<int64_t> chosen = spaced(static_cast<int64_t>(seconds.size()), frames);
    for (const int64_t i : chosen) found.seconds.push_back(seconds[static_cast<size_t>(i)]);
    opened.pictures(chosen, [&](const std::vector<uint8_t>& png) {
      Image frame = decode_picture(png, "a frame");
      picture::check_size(frame.height, frame.width, static_cast<int64_t>(chosen.size()));
      found.frames.emplace_back(std::make_shared<const Image>(std::move(frame)));
    });
  } catch (const InputError& err) {
    throw InputError(path.string() + ": not a readable video (" + err.what() + "); a video is a file that ffmpeg " +
                     "reads, or a folder of PNG or JPEG frames");
  }
  return found;
}

}  // namespace video

/// The frames of a video file, or of a folder of picture files, which are ordered by name, with numbers in a name
/// compared as numbers. At most `frames` of them, evenly spaced. Throws InputError if there are none. A folder's files
/// are not opened; a video file is decoded by ffmpeg.
inline VideoPart open_video(const std::filesystem::path& path, int64_t frames = kFrames) {
  if (frames < 1) throw InputError(std::to_string(frames) + " frames of a video: take at least one");
  std::error_code error;
  if (!std::filesystem::exists(path, error)) throw InputError(path.string() + ": no such video file or folder");
  if (!std::filesystem::is_directory(path, error)) return video::of_file(path, frames);
  const std::vector<std::string> pictures = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"};
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(path, error)) {
    std::string suffix = entry.path().extension().string();
    for (char& c : suffix) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    const std::string name = entry.path().filename().string();
    if (name[0] != '.' && std::count(pictures.begin(), pictures.end(), suffix)) names.push_back(name);
  }
  if (error) throw InputError(path.string() + ": not a readable folder (" + error.message() + ")");
  if (names.empty()) throw InputError(path.string() + ": no picture files in this folder");
  std::sort(names.begin(), names.end(), video::before);
  VideoPart chosen;
  for (const int64_t i : spaced(static_cast<int64_t>(names.size()), frames)) {
    chosen.frames.emplace_back(path / names[static_cast<size_t>(i)]);
    chosen.seconds.push_back(static_cast<double>(i) / kFramesPerSecond);
  }
  return chosen;
}

/// Throws InputError where `seconds` cannot be when each frame is shown. A video may have none.
inline void check_seconds(const VideoPart& video) {
  double last = 0;
  bool ordered = true;
  for (const double moment : video.seconds) {
    ordered = ordered && last <= moment && moment <= kMaxSeconds;  // false for NaN, too
    last = moment;
  }
  if (!video.seconds.empty() && (video.seconds.size() != video.frames.size() || !ordered)) {
    throw InputError("a video of " + std::to_string(video.frames.size()) + " frames has " +
                     std::to_string(video.seconds.size()) + " seconds: there must be one for each frame, ascending, "
                     "from 0 to 1e+06");
  }
}

/// When each frame is shown.
inline std::vector<double> moments(const VideoPart& video) {
  std::vector<double> moments = video.seconds;
  for (size_t i = 0; video.seconds.empty() && i < video.frames.size(); ++i) {
    moments.push_back(static_cast<double>(i) / kFramesPerSecond);
  }
  return moments;
}

/// When each group of frames is shown: the mean of its first and last frame's (HF: Qwen3VLProcessor).
inline std::vector<double> group_times(const std::vector<double>& moments, int64_t group) {
  const auto each = static_cast<size_t>(group);
  std::vector<double> times;
  for (size_t i = 0; i < moments.size(); i += each) {
    times.push_back((moments[i] + moments[std::min(i + each, moments.size()) - 1]) / 2);
  }
  return times;
}

/// Where the rows of each group of frames stand on the time axis, from 0 on (HF: Qwen2_5_VLModel.get_rope_index).
/// Groups are as far apart as frames are on average.
inline std::vector<int64_t> group_positions(const std::vector<double>& moments, int64_t group,
                                            double tokens_per_second) {
  const auto frames = static_cast<int64_t>(moments.size());
  const double apart = static_cast<double>(group) * (moments.back() - moments.front()) /
                       static_cast<double>(std::max<int64_t>(frames - 1, 1));
  const float each = static_cast<float>(tokens_per_second) * static_cast<float>(apart);
  std::vector<int64_t> positions;
  for (int64_t i = 0; i * group < frames; ++i) {
    positions.push_back(tokens_per_second > 0 ? static_cast<int64_t>(static_cast<float>(i) * each) : i);
  }
  return positions;
}

/// How many rows and columns of tiles each of a video's frames becomes, where pictures are `native`. `height`, `width`:
/// of the first. `max_tiles`: of a frame. HF: smart_resize of Qwen2VLVideoProcessor and Qwen3VLVideoProcessor.
inline std::array<int64_t, 2> frame_grid(int64_t height, int64_t width, int64_t frames, const ImageSpec& image,
                                         const VideoSpec& video, const std::optional<int64_t>& max_tiles) {
  const NativeVideoSpec& native = video.native.value();
  const int64_t tile = image.tile_size, group = image.native.value().frames;
  int64_t count = 1, counted = 1, most = native.max_pixels;
  if (native.whole) {
    count = std::max(frames, group);
    counted = static_cast<int64_t>(std::nearbyint(static_cast<double>(count) / static_cast<double>(group))) * group;
    if (std::min(height, width) < tile) {
      const auto side = static_cast<double>(tile);
      const double enlarge = std::max(side / static_cast<double>(height), side / static_cast<double>(width));
      height = static_cast<int64_t>(static_cast<double>(height) * enlarge);
      width = static_cast<int64_t>(static_cast<double>(width) * enlarge);
    }
  }
  if (max_tiles && *max_tiles <= most / (tile * tile * count)) most = *max_tiles * tile * tile * count;
  return whole_tiles({height, width}, tile, std::min(native.min_pixels, most), most, count, counted);
}

/// torchvision's resize, bicubic with antialiasing. It always resizes the width first.
inline Image squeeze(const Image& frame, int64_t height, int64_t width) {
  const resampling::Filter filter{resampling::bicubic, 2.0, true};
  const Image narrow = frame.width == width ? frame : resampling::resize_width(frame, width, filter);
  return narrow.height == height ? narrow : resampling::resize_height(narrow, height, filter);
}

/// image_features (frames * n * n, D) -> rows (frames * side * side, D) (HF: apply_pooling).
inline Rows pool(const Rows& features, int64_t n, int64_t side) {
  Rows pooled{features.width, {}};
  for (int64_t first = 0; first < features.count(); first += n * n) {
    const Grid grid{n, n, {features.width, {features.row(first), features.row(first + n * n)}}};
    pooled.append(bilinear(grid, side, side).cells.row(0), side * side);
  }
  return pooled;
}

}  // namespace autosteer
