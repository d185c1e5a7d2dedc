/* What xl asks of the hypervisor and of xenstore before it prints what a configuration means (xl create -n), answered without either. For LD_PRELOAD. */
static char handle[65536];
static const char capabilities[] = "xen-3.0-x86_64 hvm-3.0-x86_32 hvm-3.0-x86_64";

/* libxl_version_info of libxl's generated _libxl_types.h, Xen 4.17. */
struct version {
    int major, minor;
    const char *texts[7];
    unsigned long long virt_start;
    int page_size;
    const char *more[2];
};

void *xc_interface_open(void *logger, void *dombuild_logger, unsigned flags) { return handle; }
int xc_interface_close(void *xch) { return 0; }
int xc_get_max_cpus(void *xch) { return 64; }
int xc_get_max_nodes(void *xch) { return 1; }
void *xs_open(unsigned long flags) { return handle; }
void xs_close(void *xs) {}
int xs_fileno(void *xs) { return -1; }
int libxl_get_physinfo(void *ctx, void *info) { return 0; }
const void *libxl_get_version_info(void *ctx) {
    static const struct version version = {
        4, 17, {capabilities, capabilities, capabilities, capabilities, capabilities, capabilities, capabilities}, 0, 4096, {"", ""}};
    return &version;
}
