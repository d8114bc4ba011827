// Types and elementary functions that every kernel uses.
//
// Nothing here includes a header, so the text compiles the same under NVRTC (CuPy), nvcc and, for tests, a host
// compiler. half is read as half, computed in float and rounded once: acc_t<half> is float.
#pragma once

namespace gpugrad {

// The type that T is computed and accumulated in: double for double, float for everything narrower.
template <class T> struct accumulate { using type = float; };
template <> struct accumulate<double> { using type = double; };
template <class T> using acc_t = typename accumulate<T>::type;

__device__ __forceinline__ float exponential(float x) { return expf(x); }  // 2 ulp; __expf is off by |x| ulp
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float log1p_(float x) { return log1pf(x); }
__device__ __forceinline__ double log1p_(double x) { return log1p(x); }
__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ double magnitude(double x) { return fabs(x); }
__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }

template <class A> __device__ __forceinline__ bool is_infinite(A x) { return x - x != 0 && x == x; }

// The product of a cotangent and a slope. Where `masked`, an exact zero on either side wins over an infinity or NaN on
// the other: what an op further up has dropped (`where`, `maximum`) must stay out.
template <class A> __device__ __forceinline__ A times(A g, A d, int masked) {
  return masked && (g == 0 || d == 0) ? A(0) : g * d;
}

// sigma(z) and sigma(-z) from one exponential, each to full relative accuracy in its tail, with no overflow:
//   t = exp(-|z|);  s = (z >= 0 ? 1 : t) / (1 + t);  c = (z >= 0 ? t : 1) / (1 + t)
// Relative error 2e-7 (float), 3.5e-16 (double), or 4.2e-7, 5e-16 with an exponential that is off by the most CUDA
// documents. 1 - s would lose every digit of c from z = 17 (float), 37 (double) on.
// float32 subnormals flush to zero (CuPy compiles with -ftz=true): s is 0 below z = -87.3.
template <class A> struct Sigmoid {
  A s, c;
  __device__ __forceinline__ explicit Sigmoid(A z) {
    const A t = exponential(-magnitude(z)), sum = 1 + t;
    s = (z >= 0 ? A(1) : t) / sum;
    c = (z >= 0 ? t : A(1)) / sum;
  }
  __device__ __forceinline__ Sigmoid(A s, A c) : s(s), c(c) {}
};

__device__ constexpr int some(int count) { return count > 0 ? count : 1; }  // for arrays, of which none is empty

template <int BYTES> struct access { using type = uint4; };
template <> struct access<8> { using type = uint2; };
template <> struct access<4> { using type = unsigned; };
template <> struct access<2> { using type = unsigned short; };
template <> struct access<1> { using type = unsigned char; };

// N elements of type T, moved by accesses of 16 bytes, or one of 8, 4, 2 where they are no more; the address is a
// multiple of that.
template <class T, int N> struct Pack {
  using Word = typename access<N * sizeof(T)>::type;
  static_assert(N * sizeof(T) % sizeof(Word) == 0, "a pack is a whole number of words");
  Word words[N * sizeof(T) / sizeof(Word)];

  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int w = 0; w < int(N * sizeof(T) / sizeof(Word)); ++w) words[w] = reinterpret_cast<const Word*>(from)[w];
  }
  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int w = 0; w < int(N * sizeof(T) / sizeof(Word)); ++w) reinterpret_cast<Word*>(to)[w] = words[w];
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int w = 0; w < int(N * sizeof(T) / sizeof(Word)); ++w) words[w] = Word{};
  }
  __device__ __forceinline__ T& operator[](int k) { return reinterpret_cast<T*>(words)[k]; }
};

// A pack of one element, for addresses and lengths that 16 bytes do not divide.
template <class T> struct Pack<T, 1> {
  T value;
  __device__ __forceinline__ void load(const T* from) { value = *from; }
  __device__ __forceinline__ void store(T* to) const { *to = value; }
  __device__ __forceinline__ void clear() { value = T(0); }
  __device__ __forceinline__ T& operator[](int) { return value; }
};

// The column of an element of a row-major matrix; division by 64 bits costs several times that by 32.
__device__ __forceinline__ long long column(long long element, long long width) {
  return (element | width) >> 31 ? element % width : (long long)((unsigned)element % (unsigned)width);
}

}  // namespace gpugrad
