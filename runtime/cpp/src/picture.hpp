// PNG and JPEG files -> upright pixels, byte for byte what runtime/picture_file.py's open_image gets from Pillow.
//
// Uses libpng and libjpeg-turbo, as Pillow does, with Pillow's choices: transparency on white, 16 bits cut to 8, no
// gamma correction, EXIF (or XMP) orientation applied, CMYK as Adobe writes it, truncated files refused. Both libraries
// report errors by longjmp, so functions that call setjmp make objects with destructors before it, and have on the heap
// what changes behind it. libpng gets of a PNG what makes its pixels, once its chunks were found to be in order; of the
// others EXIF, and XMP that is not compressed, have an effect.
#pragma once

#include <algorithm>
#include <array>
#include <cerrno>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <jerror.h>
#include <jpeglib.h>  // needs <cstdio> before it
#include <png.h>

#include "errors.hpp"

namespace autosteer {

/// Pixels (height, width, 3), 8 bits each, red first.
struct Image {
  int64_t height = 0, width = 0;
  std::vector<uint8_t> rgb;

  const uint8_t* at(int64_t y, int64_t x) const { return &rgb[static_cast<size_t>(3 * (y * width + x))]; }
  uint8_t* at(int64_t y, int64_t x) { return &rgb[static_cast<size_t>(3 * (y * width + x))]; }
};

namespace picture {

constexpr int64_t kMaxPixels = 50'000'000;        // 150 MB as RGB; a few KB of a file can ask for much more
constexpr uintmax_t kMaxFileBytes = 100'000'000;  // they are in memory while the pixels are made
constexpr int64_t kMaxAspectRatio = 200;          // beyond this a side of the resized picture would round to nothing

/// A decoder's result: pixels, and the metadata blocks that may have the orientation.
struct Decoded {
  Image image;
  std::vector<uint8_t> exif;  // a TIFF structure
  std::string xmp;
  std::string error;
};

/// What is wrong with the size of `count` pictures; empty if nothing is.
inline std::string wrong_size(int64_t height, int64_t width, int64_t count = 1) {
  const std::string what = (count > 1 ? std::to_string(count) + " frames of " : "image of ") + std::to_string(width) +
                           "x" + std::to_string(height) + " pixels: ";
  if (height < 1 || width < 1) return what + "it is empty";
  return height <= kMaxPixels / count / width ? "" : what + "at most " + std::to_string(kMaxPixels);
}

/// Throws InputError for `count` pictures that are empty, or more than kMaxPixels.
inline void check_size(int64_t height, int64_t width, int64_t count = 1) {
  if (const std::string wrong = wrong_size(height, width, count); !wrong.empty()) throw InputError(wrong);
}

/// The same of a picture whose sides may not differ by more than kMaxAspectRatio times.
inline std::string wrong_shape(int64_t height, int64_t width) {
  std::string wrong = wrong_size(height, width);
  if (!wrong.empty() || std::max(height, width) <= kMaxAspectRatio * std::min(height, width)) return wrong;
  return "image of " + std::to_string(width) + "x" + std::to_string(height) + " pixels: sides may differ by " +
         std::to_string(kMaxAspectRatio) + " times at most";
}

/// Reserve the pixels, which take memory as they are decoded; false if there are too many, or their shape is extreme.
inline bool reserve(Decoded& out, int64_t height, int64_t width) {
  out.error = wrong_shape(height, width);
  if (!out.error.empty()) return false;
  out.image = {height, width, {}};
  out.image.rgb.reserve(static_cast<size_t>(3 * height * width));
  return true;
}

// --- PNG ---

/// The steps through a PNG are its chunks that make pixels; kKey is what is transparent, kBehind others behind the
/// pixels.
enum PngStep { kStart, kHeader, kPalette, kKey, kPixels, kBehind, kEnd };

/// A chunk: it may come at step `least` to `most`, and `then` is the next one.
struct PngChunk {
  std::string_view kind;
  PngStep least, most, then;
};
constexpr std::array<PngChunk, 5> kPngOrder = {{{"IHDR", kStart, kStart, kHeader},
                                                {"PLTE", kHeader, kHeader, kPalette},
                                                {"tRNS", kHeader, kPalette, kKey},
                                                {"IDAT", kHeader, kPixels, kPixels},
                                                {"IEND", kPixels, kBehind, kEnd}}};

/// The place of a chunk in that order; null if it has none.
inline const PngChunk* png_place(std::string_view kind) {
  for (const PngChunk& chunk : kPngOrder) {
    if (chunk.kind == kind) return &chunk;
  }
  return nullptr;
}

/// What a PNG's chunks say of its pixels.
struct PngHeader {
  PngStep reached = kStart;
  int64_t height = 1, width = 1;  // which wrong_shape allows, until there is a header
  unsigned depth = 0, colour = 0;
  size_t palette = 0;  // colours that a pixel can name

  /// Takes the next chunk; says what is wrong with one that may not come next, and nothing of another.
  std::string take(std::string_view kind, std::string_view data) {
    const bool letters = std::all_of(kind.begin(), kind.end(), [](char c) {
      const int lower = c | 0x20;
      return lower >= 'a' && lower <= 'z';
    });
    const PngChunk* known = png_place(kind);
    if (!known && (!letters || !(kind[0] & 0x20))) return "unknown chunk";
    const bool counted = counts(kind, data.size());
    const PngChunk place = counted ? *known : PngChunk{kind, kHeader, kBehind, reached == kPixels ? kBehind : reached};
    const bool unpainted = kind == "IDAT" && colour == PNG_COLOR_TYPE_PALETTE && palette == 0;
    if (reached < place.least || reached > place.most || unpainted) return std::string(kind) + ": out of place";
    reached = place.then;
    if (counted && !fits(kind, data)) return std::string(kind) + ": wrong content";
    const bool deep = counted && kind == "tRNS" && colour == PNG_COLOR_TYPE_RGB && depth == 16;
    return deep ? "a transparent colour of 16 bits" : "";  // Pillow keeps 8 of them
  }

  /// Whether a chunk makes pixels. A palette of others than paletted ones is a suggestion, and what is transparent must
  /// fit the picture: libpng ignores one that does not, and popular programs write it.
  bool counts(std::string_view kind, size_t size) const {
    if (kind == "PLTE") return colour == PNG_COLOR_TYPE_PALETTE;
    if (kind != "tRNS") return png_place(kind) != nullptr;
    if (colour == PNG_COLOR_TYPE_PALETTE) return size > 0 && size <= palette;
    return (colour == PNG_COLOR_TYPE_GRAY && size == 2) || (colour == PNG_COLOR_TYPE_RGB && size == 6);
  }

  /// Takes a chunk's content; whether it is one.
  bool fits(std::string_view kind, std::string_view data) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(data.data());
    const size_t size = data.size();
    if (kind == "IHDR") {
      constexpr std::array<unsigned, 7> depths = {1 | 2 | 4 | 8 | 16, 0, 8 | 16, 1 | 2 | 4 | 8, 8 | 16, 0, 8 | 16};
      if (size != 13) return false;
      width = png_get_uint_32(bytes), height = png_get_uint_32(bytes + 4), depth = bytes[8], colour = bytes[9];
      const bool allowed = colour < depths.size() && (depths[colour] & depth) && (depth & (depth - 1)) == 0;
      return width > 0 && height > 0 && allowed && bytes[10] == 0 && bytes[11] == 0 && bytes[12] < 2;
    }
    if (kind != "PLTE") return true;
    palette = std::min(size / 3, size_t{1} << depth);
    return size > 0 && size <= 768 && size % 3 == 0;
  }
};

inline uint32_t png_checksum(std::string_view data) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> made{};
    for (uint32_t i = 0; i < made.size(); ++i) {
      made[i] = i;
      for (int bit = 0; bit < 8; ++bit) made[i] = made[i] >> 1 ^ (made[i] & 1 ? 0xEDB88320 : 0);
    }
    return made;
  }();
  uint32_t sum = 0xFFFFFFFF;
  for (const char c : data) sum = sum >> 8 ^ table[(sum ^ static_cast<uint8_t>(c)) & 0xFF];
  return ~sum;
}

/// Reads a PNG's chunks. Returns the stretches of the file that make its pixels; the orientation may be in two others.
inline std::vector<std::string_view> png_chunks(const std::vector<uint8_t>& bytes, Decoded& out) {
  constexpr std::string_view xmp("XML:com.adobe.xmp\0\0\0\0\0", 22);  // not compressed, of no language
  const std::string_view file(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  std::vector<std::string_view> kept = {file.substr(0, 8)};
  PngHeader header;
  for (size_t at = 8; header.reached != kEnd && out.error.empty();) {
    out.error = "image file is truncated, or a checksum is wrong";
    const size_t left = file.size() - at;
    if (left < 12) break;
    const size_t size = png_get_uint_32(&bytes[at]);
    if (size > left - 12) break;
    if (png_checksum(file.substr(at + 4, size + 4)) != png_get_uint_32(&bytes[at + 8 + size])) break;
    const std::string_view kind = file.substr(at + 4, 4), data = file.substr(at + 8, size);
    const bool counted = header.counts(kind, size);
    out.error = header.take(kind, data);
    if (kind == "eXIf") out.exif.assign(data.begin(), data.end());
    if (kind == "iTXt" && data.substr(0, xmp.size()) == xmp) out.xmp = data.substr(xmp.size());
    const std::string_view last = kept.back();
    if (counted && last.data() + last.size() == &file[at]) {  // one stretch of many chunks
      kept.back() = {last.data(), last.size() + size + 12};
    } else if (counted) {
      kept.push_back(file.substr(at, size + 12));
    }
    at += size + 12;
  }
  if (std::string wrong = wrong_shape(header.height, header.width); !wrong.empty()) out.error = std::move(wrong);
  return kept;
}

/// What libpng reads, stretch by stretch.
struct PngSource {
  std::vector<std::string_view> stretches;
  size_t next = 0;
};

/// Whether the last row's pixels are there.
inline bool png_complete(png_structp png) {
  const int64_t height = static_cast<const Decoded*>(png_get_error_ptr(png))->image.height;
  return height > 0 && (png_get_current_row_number(png) >= height || png_get_current_pass_number(png) == 7);
}

/// Ends the reading once the pixels are there: what is behind them may be as large as it likes when decompressed.
inline void png_read(png_structp png, png_bytep target, size_t count) {
  if (png_complete(png)) png_error(png, "nothing more is needed");
  auto& source = *static_cast<PngSource*>(png_get_io_ptr(png));
  while (count > 0) {
    if (source.next == source.stretches.size()) png_error(png, "image file is truncated");
    std::string_view& from = source.stretches[source.next];
    const size_t size = std::min(count, from.size());
    std::memcpy(target, from.data(), size);
    target += size, count -= size;
    from.remove_prefix(size);
    if (from.empty()) ++source.next;
  }
}

/// What is wrong behind the last row's pixels is no error, as in Pillow.
[[noreturn]] inline void png_fail(png_structp png, png_const_charp message) {
  if (!png_complete(png)) static_cast<Decoded*>(png_get_error_ptr(png))->error = message;
  png_longjmp(png, 1);
}

inline void png_ignore(png_structp, png_const_charp) {}

/// Append `count` pixels, blended with white (Pillow's alpha_composite, AlphaComposite.c).
inline void over_white(const uint8_t* rgba, size_t count, std::vector<uint8_t>& rgb) {
  for (size_t i = 0; i < count; ++i) {
    const uint32_t alpha = rgba[4 * i + 3], behind = 255 - alpha;
    for (size_t c = 0; c < 3; ++c) {
      const uint32_t sum = (rgba[4 * i + c] * alpha + 255 * behind + 128) << 7;  // 7 more bits, as in Pillow
      rgb.push_back(static_cast<uint8_t>((((sum >> 8) + sum) >> 8) >> 7));
    }
  }
}

inline void decode_png(const std::vector<uint8_t>& bytes, Decoded& out) {
  struct State {
    png_structp png = nullptr;
    png_infop info = nullptr;
    PngSource source;
    std::unique_ptr<uint8_t[]> rgba;  // a row, or the whole picture if it is interlaced
    size_t decoding = 0;              // how many pixels libpng has in it
    std::vector<png_bytep> rows;
    ~State() { png_destroy_read_struct(&png, &info, nullptr); }
  };
  const auto state = std::make_unique<State>();
  state->source.stretches = png_chunks(bytes, out);
  if (!out.error.empty()) return;
  state->png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &out, png_fail, png_ignore);
  if (!state->png) throw Error("libpng does not start");
  state->info = png_create_info_struct(state->png);
  if (!state->info) throw Error("libpng does not start");
  if (setjmp(png_jmpbuf(state->png))) {
    if (out.error.empty()) over_white(state->rgba.get(), state->decoding, out.image.rgb);
    return;
  }
  png_set_read_fn(state->png, &state->source, png_read);
  png_set_user_limits(state->png, 0x7fffffff, 0x7fffffff);
  png_set_crc_action(state->png, PNG_CRC_QUIET_USE, PNG_CRC_QUIET_USE);  // they were compared
  png_set_benign_errors(state->png, 1);  // as in Pillow: more compressed data than the pixels need
  png_set_option(state->png, PNG_MAXIMUM_INFLATE_WINDOW, PNG_OPTION_ON);  // as in Pillow, whatever zlib's header says
  // The size of Pillow's blocks: a wrong checksum of zlib's is noticed if it is in the block where the last row ends.
  png_set_compression_buffer_size(state->png, 1 << 16);
  png_read_info(state->png, state->info);
  const int64_t height = png_get_image_height(state->png, state->info),
                width = png_get_image_width(state->png, state->info);
  if (!reserve(out, height, width)) return;
  png_set_strip_16(state->png);
  png_set_expand(state->png);  // palettes, fewer than 8 bits, and a transparent colour as alpha
  png_set_gray_to_rgb(state->png);
  png_set_add_alpha(state->png, 0xFF, PNG_FILLER_AFTER);
  const bool interlaced = png_set_interlace_handling(state->png) > 1;
  png_read_update_info(state->png, state->info);
  if (png_get_rowbytes(state->png, state->info) != static_cast<size_t>(4 * width)) {
    png_error(state->png, "unexpected layout");
  }
  const auto row = static_cast<size_t>(width);
  state->decoding = row * (interlaced ? static_cast<size_t>(height) : 1);
  state->rgba.reset(new uint8_t[4 * state->decoding]);
  if (interlaced) {
    for (int64_t y = 0; y < height; ++y) state->rows.push_back(state->rgba.get() + 4 * y * width);
    png_read_image(state->png, state->rows.data());
    over_white(state->rgba.get(), state->decoding, out.image.rgb);
  } else {
    for (int64_t y = 0; y < height; ++y) {
      png_read_row(state->png, state->rgba.get(), nullptr);
      over_white(state->rgba.get(), row, out.image.rgb);
    }
  }
}

// --- JPEG ---

struct JpegErrors {
  jpeg_error_mgr manager;  // first: libjpeg hands us a pointer to it
  std::jmp_buf escape;
  Decoded* out;
};

[[noreturn]] inline void jpeg_fail(j_common_ptr info) {
  auto* errors = reinterpret_cast<JpegErrors*>(info->err);
  char message[JMSG_LENGTH_MAX];
  info->err->format_message(info, message);
  errors->out->error = message;
  std::longjmp(errors->escape, 1);
}

inline void jpeg_warn(j_common_ptr info, int level) {
  const auto* picture = reinterpret_cast<jpeg_decompress_struct*>(info);
  const bool complete = picture->output_scanline > 0 && picture->output_scanline == picture->output_height;
  if (level < 0 && info->err->msg_code == JWRN_JPEG_EOF && !complete) jpeg_fail(info);  // "image file is truncated"
}

inline void jpeg_metadata(const jpeg_decompress_struct& info, Decoded& out) {
  constexpr std::string_view exif("Exif\0\0", 6), xmp("http://ns.adobe.com/xap/1.0/\0", 29);
  for (jpeg_saved_marker_ptr marker = info.marker_list; marker; marker = marker->next) {
    const std::string_view data(reinterpret_cast<const char*>(marker->data), marker->data_length);
    if (data.substr(0, exif.size()) == exif) {  // a long one goes on in the next marker
      out.exif.insert(out.exif.end(), data.begin() + exif.size(), data.end());
    } else if (data.substr(0, xmp.size()) == xmp) {
      out.xmp = data.substr(xmp.size());
    }
  }
}

/// Pillow's CMYK to RGB, of inverted values as Adobe writes them.
inline void cmyk_row_to_rgb(const std::vector<uint8_t>& cmyk, uint8_t* rgb) {
  for (size_t x = 0; x < cmyk.size() / 4; ++x) {
    const int black = cmyk[4 * x + 3];
    for (size_t c = 0; c < 3; ++c) {
      const int product = (255 - cmyk[4 * x + c]) * black + 128;
      rgb[3 * x + c] = static_cast<uint8_t>(std::max(black - (((product >> 8) + product) >> 8), 0));
    }
  }
}

inline void decode_jpeg(const std::vector<uint8_t>& bytes, Decoded& out) {
  struct State {
    jpeg_decompress_struct info{};
    JpegErrors errors{};
    std::vector<uint8_t> cmyk;
    ~State() { jpeg_destroy_decompress(&info); }
  };
  const auto state = std::make_unique<State>();
  jpeg_decompress_struct& info = state->info;
  info.err = jpeg_std_error(&state->errors.manager);
  state->errors.manager.error_exit = jpeg_fail;
  state->errors.manager.emit_message = jpeg_warn;
  state->errors.out = &out;
  if (setjmp(state->errors.escape)) return;
  jpeg_create_decompress(&info);
  jpeg_mem_src(&info, bytes.data(), static_cast<unsigned long>(bytes.size()));
  jpeg_save_markers(&info, JPEG_APP0 + 1, 0xFFFF);
  jpeg_read_header(&info, TRUE);
  jpeg_metadata(info, out);
  const bool cmyk = info.jpeg_color_space == JCS_CMYK || info.jpeg_color_space == JCS_YCCK;
  info.out_color_space = cmyk ? JCS_CMYK : JCS_RGB;
  if (!reserve(out, info.image_height, info.image_width)) return;
  jpeg_start_decompress(&info);
  state->cmyk.resize(cmyk ? static_cast<size_t>(4 * out.image.width) : 0);
  while (info.output_scanline < info.output_height) {
    out.image.rgb.resize(static_cast<size_t>(3 * out.image.width * (int64_t{info.output_scanline} + 1)));
    uint8_t* rgb = out.image.at(info.output_scanline, 0);
    JSAMPROW row = cmyk ? state->cmyk.data() : rgb;
    jpeg_read_scanlines(&info, &row, 1);
    if (cmyk) cmyk_row_to_rgb(state->cmyk, rgb);
  }
  jpeg_finish_decompress(&info);
}

// --- orientation ---

/// The orientation tag (0x0112) of a TIFF structure, if it has one; 0 if that is no whole number, or there is no TIFF.
/// As in Pillow: of several numbers the first counts, data outside of the file ends the reading.
inline std::optional<unsigned> exif_orientation(std::vector<uint8_t> tiff) {
  constexpr std::string_view exif("Exif\0\0", 6);  // before all, once more
  if (std::equal(exif.begin(), exif.end(), tiff.begin(), tiff.begin() + std::min(exif.size(), tiff.size()))) {
    tiff.erase(tiff.begin(), tiff.begin() + exif.size());
  }
  if (tiff.empty()) return std::nullopt;
  constexpr std::array<std::string_view, 5> marks = {  // the last one is of BigTIFF, but Pillow reads a TIFF
      {{"II*\0", 4}, {"II\0*", 4}, {"MM*\0", 4}, {"MM\0*", 4}, {"MM\0+", 4}}};
  const std::string_view mark(reinterpret_cast<const char*>(tiff.data()), std::min<size_t>(tiff.size(), 4));
  if (tiff.size() < 8 || std::find(marks.begin(), marks.end(), mark) == marks.end()) return 0;
  const bool little = tiff[0] == 'I';
  const auto number = [&](uint64_t at, uint64_t size) {
    uint64_t value = 0;
    for (uint64_t i = 0; i < size; ++i) value |= uint64_t{tiff[at + i]} << 8 * (little ? i : size - 1 - i);
    return value;
  };
  // Bytes of a value, by type; below 0 it is no whole number.
  constexpr std::array<int, 17> sizes = {0, -1, -1, 2, 4, -8, 1, -1, 2, 4, -8, -4, -8, 4, 0, 0, 8};
  const uint64_t directory = number(4, 4), end = tiff.size();
  const uint64_t entries = directory + 2 <= end ? number(directory, 2) : 0;
  std::vector<bool> given(0x10000);  // tags: of two with a value the first counts
  uint64_t outside = 0;  // bytes that do not fit into their entries
  for (uint64_t i = 0; i < entries && directory + 2 + 12 * (i + 1) <= end; ++i) {
    const uint64_t entry = directory + 2 + 12 * i, tag = number(entry, 2), type = number(entry + 2, 2);
    if (given[tag]) continue;
    const int each = type < sizes.size() ? sizes[type] : 0;
    const auto width = static_cast<uint64_t>(std::abs(each)), size = width * number(entry + 4, 4);
    uint64_t at = entry + 8;
    if (size > 4) {
      at = number(at, 4);
      if ((outside += size) > end) continue;
      if (at + size > end) return std::nullopt;
    }
    given[tag] = size > 0;
    if (tag != 0x0112 || size == 0) continue;
    return each > 0 ? static_cast<unsigned>(std::min<uint64_t>(number(at, width), 9)) : 0;
  }
  return std::nullopt;
}

/// The digit behind the first `tiff:Orientation="` or `tiff:Orientation>` that has one; 0 if none has.
inline unsigned xmp_orientation(std::string_view xmp) {
  constexpr std::string_view key = "tiff:Orientation";
  for (size_t at = xmp.find(key); at != std::string_view::npos; at = xmp.find(key, at + 1)) {
    std::string_view rest = xmp.substr(at + key.size());
    const size_t opening = rest.substr(0, 2) == "=\"" ? 2 : rest.substr(0, 1) == ">" ? 1 : 0;
    rest.remove_prefix(opening);
    if (opening && !rest.empty() && rest[0] >= '0' && rest[0] <= '9') return static_cast<unsigned>(rest[0] - '0');
  }
  return 0;
}

/// The image turned and mirrored as EXIF orientation 2..8 asks.
inline Image turned(Image image, unsigned orientation) {
  if (orientation < 2 || orientation > 8) return image;
  const bool swap = orientation >= 5;
  const bool flip_x = orientation == 2 || orientation == 3 || orientation == 6 || orientation == 7;
  const bool flip_y = orientation == 3 || orientation == 4 || orientation == 7 || orientation == 8;
  Image out{swap ? image.width : image.height, swap ? image.height : image.width,
            std::vector<uint8_t>(image.rgb.size())};
  for (int64_t y = 0; y < out.height; ++y) {
    for (int64_t x = 0; x < out.width; ++x) {
      const int64_t across = flip_x ? out.width - 1 - x : x, down = flip_y ? out.height - 1 - y : y;
      std::memcpy(out.at(y, x), swap ? image.at(across, down) : image.at(down, across), 3);
    }
  }
  return out;
}

}  // namespace picture

inline Image decode_picture(const std::vector<uint8_t>& bytes, const std::string& name);

/// A PNG or JPEG file as upright RGB. Throws InputError for a missing file, another format, or a damaged image.
inline Image read_picture(const std::filesystem::path& path) {
  std::error_code ignored;
  if (!std::filesystem::exists(path, ignored)) throw InputError(path.string() + ": no such image file");
  if (!std::filesystem::is_regular_file(path, ignored)) {  // before it is opened: never wait for a pipe
    throw InputError(path.string() + ": not a readable image (not a file)");
  }
  if (const uintmax_t size = std::filesystem::file_size(path, ignored); size > picture::kMaxFileBytes) {
    throw InputError(path.string() + ": not a readable image (" + std::to_string(size) + " bytes: at most " +
                     std::to_string(picture::kMaxFileBytes) + ")");
  }
  std::vector<uint8_t> bytes;
  try {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw InputError(path.string() + ": not a readable image (" + std::strerror(errno) + ")");
    bytes.assign(std::istreambuf_iterator<char>(file), {});
  } catch (const std::ios_base::failure& err) {  // of a device in the place of a file
    throw InputError(path.string() + ": not a readable image (" + err.what() + ")");
  }
  return decode_picture(bytes, path.string());
}

/// The same for the bytes of such a file; `name` is what errors call it.
inline Image decode_picture(const std::vector<uint8_t>& bytes, const std::string& name) {
  picture::Decoded decoded;
  if (bytes.size() >= 8 && png_sig_cmp(bytes.data(), 0, 8) == 0) {
    picture::decode_png(bytes, decoded);
  } else if (bytes.size() >= 3 && bytes[0] == 0xFF && bytes[1] == 0xD8 && bytes[2] == 0xFF) {
    picture::decode_jpeg(bytes, decoded);
  } else {
    decoded.error = "neither PNG nor JPEG";
  }
  if (!decoded.error.empty()) {
    throw InputError(name + ": not a readable image (" + decoded.error + ")");
  }
  const std::optional<unsigned> exif = picture::exif_orientation(decoded.exif);
  return picture::turned(std::move(decoded.image), exif ? *exif : picture::xmp_orientation(decoded.xmp));
}

}  // namespace autosteer
