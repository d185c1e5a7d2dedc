/* usage: edit IMAGE CONTENT PATH...
 * Replaces files of an unmounted ext4 image by the content of a file, as a program in C does it with libext2fs: new inode, data, name; the old inode and
 * its blocks are freed. Missing directories are made. Prints the milliseconds from opening the image to having it durable (closing it flushes).
 * Built by scripts/bench.sh: cc -O2 edit.c -lext2fs -lcom_err
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <ext2fs/ext2fs.h>

static void check(errcode_t error, const char *doing, const char *what)
{
	if (!error)
		return;
	fprintf(stderr, "edit: %s %s: %s\n", doing, what, error_message(error));
	exit(1);
}

static double now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

/* ext2fs_link says when a directory has to grow first. */
static void add_name(ext2_filsys fs, ext2_ino_t dir, const char *name, ext2_ino_t ino, int type)
{
	errcode_t error = ext2fs_link(fs, dir, name, ino, type);

	if (error == EXT2_ET_DIR_NO_SPACE) {
		check(ext2fs_expand_dir(fs, dir), "grow the directory of", name);
		error = ext2fs_link(fs, dir, name, ino, type);
	}
	check(error, "add the name", name);
}

static ext2_ino_t directory(ext2_filsys fs, ext2_ino_t parent, const char *name)
{
	ext2_ino_t ino;
	errcode_t error = ext2fs_namei_follow(fs, EXT2_ROOT_INO, parent, name, &ino);

	if (error == EXT2_ET_FILE_NOT_FOUND) {
		error = ext2fs_mkdir(fs, parent, 0, name);
		if (error == EXT2_ET_DIR_NO_SPACE) {
			check(ext2fs_expand_dir(fs, parent), "grow the directory of", name);
			error = ext2fs_mkdir(fs, parent, 0, name);
		}
		check(error, "make the directory", name);
		error = ext2fs_namei(fs, EXT2_ROOT_INO, parent, name, &ino);
	}
	check(error, "look up", name);
	return ino;
}

static void remove_name(ext2_filsys fs, ext2_ino_t dir, const char *name)
{
	struct ext2_inode inode;
	ext2_ino_t ino;
	errcode_t error = ext2fs_lookup(fs, dir, name, strlen(name), NULL, &ino);

	if (error == EXT2_ET_FILE_NOT_FOUND)
		return;
	check(error, "look up", name);
	check(ext2fs_unlink(fs, dir, name, 0, 0), "unlink", name);
	check(ext2fs_read_inode(fs, ino, &inode), "read the inode of", name);
	if (--inode.i_links_count == 0) {
		inode.i_dtime = time(NULL);
		if (ext2fs_inode_has_valid_blocks2(fs, &inode))
			check(ext2fs_punch(fs, ino, &inode, NULL, 0, ~0ULL), "free the blocks of", name);
		ext2fs_inode_alloc_stats2(fs, ino, -1, 0);
	}
	check(ext2fs_write_inode(fs, ino, &inode), "write the inode of", name);
}

static void replace(ext2_filsys fs, char *path, const char *content, unsigned len)
{
	ext2_ino_t dir = EXT2_ROOT_INO, ino;
	struct ext2_inode inode;
	ext2_file_t file;
	unsigned written;
	char *name = strtok(path, "/"), *next;

	while ((next = strtok(NULL, "/")) != NULL) {
		dir = directory(fs, dir, name);
		name = next;
	}
	remove_name(fs, dir, name);
	check(ext2fs_new_inode(fs, dir, 0100644, 0, &ino), "find an inode for", name);
	ext2fs_inode_alloc_stats2(fs, ino, +1, 0);
	memset(&inode, 0, sizeof(inode));
	inode.i_mode = 0100644;
	inode.i_links_count = 1;
	inode.i_atime = inode.i_ctime = inode.i_mtime = time(NULL);
	if (ext2fs_has_feature_extents(fs->super)) {
		ext2_extent_handle_t handle;

		check(ext2fs_extent_open2(fs, ino, &inode, &handle), "start the extents of", name);
		ext2fs_extent_free(handle);
	}
	check(ext2fs_write_new_inode(fs, ino, &inode), "write the inode of", name);
	check(ext2fs_file_open(fs, ino, EXT2_FILE_WRITE, &file), "open", name);
	check(ext2fs_file_write(file, content, len, &written), "write", name);
	check(ext2fs_file_close(file), "close", name);
	add_name(fs, dir, name, ino, EXT2_FT_REG_FILE);
}

int main(int argc, char **argv)
{
	static char content[65536];
	ext2_filsys fs;
	double begun = now_ms();
	FILE *file;
	size_t len;
	int i;

	if (argc < 4 || !(file = fopen(argv[2], "rb"))) {
		fprintf(stderr, "usage: edit IMAGE CONTENT PATH...\n");
		return 2;
	}
	len = fread(content, 1, sizeof(content), file);
	fclose(file);
	initialize_ext2_error_table();
	check(ext2fs_open(argv[1], EXT2_FLAG_RW | EXT2_FLAG_64BITS, 0, 0, unix_io_manager, &fs), "open", argv[1]);
	check(ext2fs_read_bitmaps(fs), "read the bitmaps of", argv[1]);
	for (i = 3; i < argc; i++)
		replace(fs, argv[i], content, len);
	check(ext2fs_close_free(&fs), "close", argv[1]);
	printf("%.3f\n", now_ms() - begun);
	return 0;
}
