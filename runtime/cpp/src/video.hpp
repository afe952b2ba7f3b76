// A video -> pixel_values; its frames' features -> the video's rows in the prompt. The C++ side of runtime/video.py.
//
//     frames    ->  one tile each, squeezed
//     features  ->  each frame's rows pooled, frame after frame, and one newline row at the very end
//
// Frames are resized as torchvision does, like in Hugging Face's video processor; Pillow's pixels differ.
#pragma once

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <filesystem>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "ffmpeg.hpp"
#include "image.hpp"

namespace autosteer {

constexpr int64_t kFrames = 8;  // taken from a video by default

/// Indices of `count` frames out of `total`, evenly spaced from the first to the last; all if there are not more.
inline std::vector<int64_t> spaced(int64_t total, int64_t count) {
  count = std::min(total, count);
  std::vector<int64_t> chosen;
  for (int64_t i = 0; i < count; ++i) chosen.push_back(i * (total - 1) / std::max<int64_t>(count - 1, 1));
  return chosen;
}

namespace video {

inline bool digit(char c) {
  return '0' <= c && c <= '9';
}

/// Order of names with their numbers as numbers: 2.png comes before 10.png.
inline bool before(const std::string& a, const std::string& b) {
  size_t i = 0, j = 0;
  const auto number = [](const std::string& text, size_t& at) {  // without leading zeros, the longer number is larger
    while (at < text.size() && text[at] == '0') ++at;
    const size_t first = at;
    while (at < text.size() && digit(text[at])) ++at;
    return std::pair(at - first, text.substr(first, at - first));
  };
  const auto words = [](const std::string& text, size_t& at) {
    const size_t first = at;
    while (at < text.size() && !digit(text[at])) ++at;
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
inline std::vector<ImageLike> of_film(const std::filesystem::path& path, int64_t frames) {
  std::vector<ImageLike> found;
  try {
    const ffmpeg::Descriptor file = ffmpeg::open_regular(path);
    const ffmpeg::Film film(file);
    const std::vector<int64_t> chosen = spaced(film.count(), frames);
    film.pictures(chosen, [&](const std::vector<uint8_t>& png) {
      Image frame = decode_picture(png, "a frame");
      if (frame.width * frame.height > picture::kMaxPixels / static_cast<int64_t>(chosen.size())) {
        throw InputError(std::to_string(chosen.size()) + " frames of " + std::to_string(frame.width) + "x" +
                         std::to_string(frame.height) + " pixels: at most " + std::to_string(picture::kMaxPixels));
      }
      found.emplace_back(std::move(frame));
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
inline std::vector<ImageLike> open_video(const std::filesystem::path& path, int64_t frames = kFrames) {
  if (frames < 1) throw InputError(std::to_string(frames) + " frames of a video: take at least one");
  std::error_code error;
  if (!std::filesystem::exists(path, error)) throw InputError(path.string() + ": no such video file or folder");
  if (!std::filesystem::is_directory(path, error)) return video::of_film(path, frames);
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
  std::vector<ImageLike> chosen;
  for (const int64_t i : spaced(static_cast<int64_t>(names.size()), frames)) {
    chosen.emplace_back(path / names[static_cast<size_t>(i)]);
  }
  return chosen;
}

/// torchvision's resize to a square, bicubic with antialiasing. It always resizes the width first.
inline Image squeeze(const Image& frame, int64_t side) {
  const resampling::Filter filter{resampling::bicubic, 2.0, true};
  const Image narrow = frame.width == side ? frame : resampling::resize_width(frame, side, filter);
  return narrow.height == side ? narrow : resampling::resize_height(narrow, side, filter);
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
