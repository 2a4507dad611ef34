// Whose threads this library computes with: a process may hold several OpenMP runtimes, each with a pool of its own.

// What the compiler calls where a parallel region begins, declared as the runtime has it.
#if defined(_OPENMP) && defined(__clang__)
extern "C" void __kmpc_fork_call(void*, int, void (*)(int*, int*, ...), ...);
#define FORK __kmpc_fork_call
#elif defined(_OPENMP)
extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
#define FORK GOMP_parallel
#endif

// Its address, from which the system's loader tells the library that holds it; null: built for one thread.
extern "C" __attribute__((visibility("default"))) void* bcl_cpu_openmp() {
#if defined(FORK)
    return (void*)&FORK;
#else
    return nullptr;
#endif
}
