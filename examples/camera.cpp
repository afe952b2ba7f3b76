// camera PACKAGE WIDTH HEIGHT SECONDS: raw RGB frames on stdin; for each a line of answer, ended after SECONDS.
//
//     ffmpeg -i /dev/video0 -r 1 -s 320x240 -f rawvideo -pix_fmt rgb24 - | camera package/ 320 240 1.0
#include <autosteer/autosteer.hpp>
#include <chrono>
#include <cstdlib>
#include <future>
#include <iostream>

int main(int argc, char** argv) try {
  if (argc != 5) return std::cerr << "usage: camera PACKAGE WIDTH HEIGHT SECONDS\n", 2;
  const autosteer::Engine engine(argv[1]);
  const int64_t width = std::atoll(argv[2]), height = std::atoll(argv[3]);
  const std::chrono::duration<double> limit(std::atof(argv[4]));
  autosteer::Settings settings;
  settings.policy = "stop";  // for an unsafe frame: the refusal's text, nothing else
  std::vector<char> frame(static_cast<size_t>(3 * width * height));
  while (std::cin.read(frame.data(), static_cast<std::streamsize>(frame.size()))) {
    const auto picture = autosteer::Image::from_rgb(width, height, reinterpret_cast<const uint8_t*>(frame.data()));
    autosteer::Stream answer = engine.stream({autosteer::Message::user("what is shown here?", {picture})}, settings);
    std::promise<void> done;
    auto ended = done.get_future();
    const auto clock = std::async(std::launch::async, [&] {
      if (ended.wait_for(limit) == std::future_status::timeout) answer.cancel();
    });
    try {
      for (const autosteer::Chunk& chunk : answer) std::cout << chunk.text << std::flush;
    } catch (const autosteer::Error& err) {
      if (err.code != AUTOSTEER_CANCELLED) throw;
    }
    done.set_value();
    std::cout << std::endl;
  }
  return 0;
} catch (const autosteer::Error& err) {
  std::cerr << "camera: " << err.what() << "\n";
  return err.code;
}
