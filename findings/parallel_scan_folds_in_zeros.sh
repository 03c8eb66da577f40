#!/usr/bin/env bash
# libstdc++ of GCC 12.2 (Debian's libstdc++-12-dev 12.2.0-14+deb12u1, TBB 2021.8.0-2+deb12u1): std::inclusive_scan with
# std::execution::par over doubles folds a zero in that is not of the input, as if it were every operation's neutral element.
# Scanning {5, 7, 6, 9} by minimum gives 5 0 0 0 where the sequential scan gives 5 5 5 5, and 0 0 0 0 with an initial value of
# 99; by product it gives 5 0 0 0 where 5 35 210 1890 is right. Sums are right, since a zero changes none.
# Exits 1 where this behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
apt-get download -qq libstdc++-12-dev=12.2.0-14+deb12u1 libtbb-dev=2021.8.0-2+deb12u1 libtbb12=2021.8.0-2+deb12u1 2>/dev/null
for package in *.deb; do dpkg -x "$package" root; done
cat >scan.cc <<'CC'
#include <algorithm>
#include <cstdio>
#include <execution>
#include <numeric>
#include <vector>

template <typename Scan> void print(const char *name, Scan scan) {
  std::vector<double> out(4);
  scan(out);
  std::printf("%s %g %g %g %g\n", name, out[0], out[1], out[2], out[3]);
}

int main() {
  const std::vector<double> in{5, 7, 6, 9};
  auto least = [](double a, double b) { return std::min(a, b); };
  auto times = [](double a, double b) { return a * b; };
  auto plus = [](double a, double b) { return a + b; };
  auto par = std::execution::par;
  print("min sequential", [&](auto &o) { std::inclusive_scan(in.begin(), in.end(), o.begin(), least); });
  print("min par", [&](auto &o) { std::inclusive_scan(par, in.begin(), in.end(), o.begin(), least); });
  print("min par from 99", [&](auto &o) { std::inclusive_scan(par, in.begin(), in.end(), o.begin(), least, 99.0); });
  print("product par", [&](auto &o) { std::inclusive_scan(par, in.begin(), in.end(), o.begin(), times); });
  print("sum par", [&](auto &o) { std::inclusive_scan(par, in.begin(), in.end(), o.begin(), plus); });
}
CC
library=$(dirname "$(find root -name libtbb.so.12 | head -1)")
g++ -std=c++17 -O1 -nostdinc++ -isystem root/usr/include/c++/12 -isystem "root/usr/include/$(gcc -print-multiarch)/c++/12" \
  -isystem root/usr/include scan.cc -o scan "$library/libtbb.so.12" "-Wl,-rpath,$folder/$library"
./scan | tee seen.txt
diff seen.txt - <<'SEEN'
min sequential 5 5 5 5
min par 5 0 0 0
min par from 99 0 0 0 0
product par 5 0 0 0
sum par 5 12 18 27
SEEN
